"""In a step the host waits for the device once: for loss, gradient norm and evidence together."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.digests import Digests
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.mesh import mesh_context, sum_over_ranks_on_device
from tandem.trainer.guard import Guard
from tandem.trainer.run_state import StepContext
from tandem.trainer.runtime import signals
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.bench.synthetic_batch import draw_batch
from tandem.trainer.train import timed_train_step
from tests import ranks, tiny_configs
from tests.device_syncs import SyncRecord, place_of, record_cpu_syncs, record_gpu_syncs

WARM_UP, GOOD, BAD = range(2), 2, 3
"""Numbers of steps; before the bad one a weight becomes nan, so that its update is left out."""
THE_ONE = [place_of(sum_over_ranks_on_device)]


def batches(stepper: StepContext, agreement: Coordinator) -> Iterator[Batch]:
    """As in a run, where every step begins with the question whether a rank was told to stop."""
    phase = stepper.timeline.phase_span_at(0).phase
    for step, batch in enumerate([draw_batch(stepper.config, phase, step, stepper.mesh) for step in range(BAD + 1)]):
        agreement.any_rank(False)
        yield replace(batch, digests=Digests(2**40 + stepper.mesh.dp_rank, 2**63 + step))


def steps(variant: str, tp_size: int) -> tuple[SyncRecord, SyncRecord]:
    """What is seen of a good step and of a bad one."""
    with mesh_context(tp_size) as mesh, closing(signals.StopSignal()) as stop_signal:
        config = tiny_configs.make_config(
            variant, run={"precision": "bf16"}, parallel={"tp_size": tp_size}, optim={"max_grad_norm": 1e-3},
            log={"wandb": "disabled", "every_steps": 1},  # so that a number of the log steps only is computed here too
        )  # fmt: skip
        engine = build_engine(config, mesh, None)
        stepper = StepContext(config, mesh, Timeline(config.schedule), engine, 1.0, Guard(config.guard))
        watch = record_cpu_syncs if mesh.device.type == "cpu" else record_gpu_syncs
        for group in engine._optimizer.param_groups:
            group["fused"] = True  # as on a GPU: torch's other AdamW reads its counter of steps, on the host
        rows = batches(stepper, Coordinator(mesh, stop_signal))
        for step in WARM_UP:
            timed_train_step(stepper, rows, step)
        with watch() as good:
            done = timed_train_step(stepper, rows, GOOD)
        assert (done.judgement.decision, done.record.grad_norm > 1e-3) == ("update", True), "clipped"
        with torch.no_grad():
            engine.model.final_norm.weight.fill_(math.nan)
        with watch() as bad:
            done = timed_train_step(stepper, rows, BAD)
        assert done.judgement.decision == "skip"
        return good, bad


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    """Torch as a run has it, until the test ends."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the calls that would wait, where there is no GPU")
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_a_step_waits_for_the_device_once(variant):
    good, bad = steps(variant, 1)
    print(f"figures {variant}: operations {good.num_operations} good, {bad.num_operations} bad")
    assert (good.sync_sites, bad.sync_sites) == (THE_ONE, THE_ONE)


def on_four(folder: Path) -> dict[str, list[list[str]]]:
    return {variant: [seen.sync_sites for seen in steps(variant, 2)] for variant in tiny_configs.VARIANTS}


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="of the calls that would wait, where there is no GPU")
def test_a_step_of_four_ranks_waits_for_the_device_once(tmp_path):
    assert (
        ranks.run(on_four, 4, tmp_path, tmp_path)
        == [{variant: [THE_ONE, THE_ONE] for variant in tiny_configs.VARIANTS}] * 4
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_a_step_on_a_gpu_waits_for_it_once(variant):
    good, bad = steps(variant, 1)
    assert (len(good.sync_sites), len(bad.sync_sites)) == (1, 1), (good.sync_sites, bad.sync_sites)
