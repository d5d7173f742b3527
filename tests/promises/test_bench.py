"""`tandem bench` runs the trainer's own steps, and the figures of its line are consistent."""

import argparse
import dataclasses
import json
import math
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.config import TrainConfig, flops, parse_dataclass
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, count_collectives, mesh_context
from tandem.trainer.distributed.watchdog import Watchdog, current_process
from tandem.trainer.guard import Guard
from tandem.trainer.metrics.records import Sinks
from tandem.trainer.run_state import Progress, RunContext, StepContext
from tandem.trainer.runtime import signals
from tandem.trainer.startup import build_engine
from tandem.trainer.tools import bench
from tandem.trainer.tools.bench.measure import measure_phase
from tandem.trainer.tools.bench.plan import PhasePlan, build_plans
from tandem.trainer.tools.bench.synthetic_batch import draw_batch
from tandem.trainer.train import train_loop
from tests import ranks, tiny_configs

pytestmark = [pytest.mark.dist, pytest.mark.slow]
PEAK_FLOPS = 2e11
TWICE = ["--phase", "long", "--num-layers", "1", "--global-batch-size", "4", "--steps", "3", "--warmup-steps", "2"]
"""Options for one rank, and for two tensor-parallel ranks."""
FEW = "--global-batch-size 8 --warmup-steps 1 --steps 3"
"""Options for two replicas."""
CARD = {
    "name": "card", "peak_flops": PEAK_FLOPS, "memory_gib": 1.0, "memory_bytes_per_second": 1e9, "devices_per_node": 1,
}  # fmt: skip


def tree(**sections: dict) -> dict:
    """A config with grouped keys, document masks, bf16 with fp32 masters, gradients that are always clipped, and no corpus."""
    run = {"name": "tiny", "seed": 1, "precision": "bf16", "root": "runs"}
    lr = {"kind": "linear", "peak": 1e-2, "final": 1e-4, "warmup_steps": 2, "decay_steps": None}
    phases = [
        {
            "name": name,
            "tokens": 20 * 512,
            "seq_len": seq_len,
            "global_batch_size": rows,
            "micro_batch_size": 2,
            "mixture": {"corpus": 1.0},
        }
        for name, seq_len, rows in (("short", 32, 16), ("long", 64, 8))
    ]
    found = tiny_configs.config_tree("stablelm", run=run, optim={"max_grad_norm": 0.05}, **sections)
    return found | {"schedule": {"tokens_per_step": 512, "phases": phases, "lr": lr}, "hardware": CARD}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree()))
    return folder


def run_bench(*words: str) -> tuple[str, str]:
    """Run `tandem bench` in this process; return its standard output and standard error."""
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        assert main(["bench", *words]) == 0
    return output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def printed(place, tmp_path_factory) -> tuple[str, str]:
    """One of two layers, the second phase, half of its rows, and one more step under the profiler."""
    options = [f"run.root={place}/runs", *TWICE, "--profile", str(place / "trace.json")]
    [printed] = ranks.run(run_bench, 1, tmp_path_factory.mktemp("one"), str(place / "config.yaml"), *options)
    return printed


@pytest.fixture(scope="module")
def line(printed) -> dict[str, Any]:
    [only] = printed[0].splitlines()
    found: dict[str, Any] = json.loads(only)
    return found


def test_the_line_names_what_was_measured(line, place):
    expected = {
        "overrides": [f"run.root={place}/runs", "--global-batch-size 4"],
        "config": "tiny",
        "family": "stablelm",
        "num_layers": 1,
        "recipe_num_layers": 2,
        "phase": "long",
        "seq_len": 64,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "num_micro_batches": 2,
        "tp_size": 1,
        "dp_size": 1,
        "zero_stage": 1,
        "precision": "bf16",
        "recompute": "none",
        "deterministic": True,
        "document_masking": True,
        "num_warmup_steps": 2,
        "num_timed_steps": 3,
        "hardware": "card",
        "peak_flops": PEAK_FLOPS,
        "torch": torch.__version__,
        "peak_allocated_gib": None,
    }
    assert {name: line[name] for name in expected} == expected
    assert line["num_parameters"] == flops.num_parameters(one_layer())
    assert 0.1 < line["peak_resident_gib"] < 16, "the size of a process with torch and a tiny model"
    assert line["device"]
    assert line["deepspeed"]
    assert line["triton"]


def one_layer():
    config: TrainConfig = parse_dataclass(TrainConfig, tree(), "")
    return dataclasses.replace(config.model, num_layers=1)


def test_its_figures_are_consistent(line):
    tokens, rate = 4 * 64, line["tokens_per_second"]
    assert line["tokens_per_step"] == tokens
    assert rate * line["step_seconds"] == pytest.approx(tokens)
    assert line["step_seconds_p20"] <= line["step_seconds"] <= line["step_seconds_p80"]
    assert line["tokens_per_second_p80"] * line["step_seconds_p20"] == pytest.approx(tokens)
    assert line["tokens_per_second_p20"] * line["step_seconds_p80"] == pytest.approx(tokens)
    for suffix, causal in (("", False), ("_causal", True)):
        achieved = flops.flops_per_token(one_layer(), 64, causal=causal) * rate
        assert line[f"mfu{suffix}"] == pytest.approx(achieved / PEAK_FLOPS)
        assert line[f"share_of_matmul{suffix}"] == pytest.approx(achieved / line["matmul_flops"])
        assert line[f"{suffix[1:]}{'_' * causal}model_tflops_per_second_per_device"] == pytest.approx(achieved / 1e12)


def test_parts_are_the_step(line):
    parts = line["part_seconds"]
    assert list(parts) == ["data", "forward", "backward", "update", "other"]
    assert min(parts.values()) > 0
    # Their clock starts just before the loop's and stops just after it, so any excess is in the first or the last part.
    too_much = sum(parts.values()) - line["instrumented_step_seconds"]
    assert 0 <= too_much <= parts["data"] + parts["other"]


def test_the_recipes_own_batch_is_derived_by_its_rows(line):
    derived = line["derived"]
    assert derived["full_global_batch_size"] == 8
    assert derived["accumulation_seconds"] + derived["update_seconds"] == pytest.approx(line["step_seconds"])
    assert derived["update_seconds"] == line["part_seconds"]["update"] + line["part_seconds"]["other"]
    seconds = derived["step_seconds_at_full_batch"]
    assert seconds == pytest.approx(2 * derived["accumulation_seconds"] + derived["update_seconds"])
    rate = derived["tokens_per_second_at_full_batch"]
    assert rate * seconds == pytest.approx(512)
    assert derived["mfu_at_full_batch"] / line["mfu"] == pytest.approx(rate / line["tokens_per_second"])


def test_progress_and_the_profile_go_to_standard_error(printed, place):
    _, errors = printed
    assert "tiny, 1 of 2 layers" in errors
    assert errors.count("warm-up step") == 2
    assert errors.count("timed step") == 3
    table = errors[errors.index("one step under the profiler") :]
    for kind in (
        "matmul",
        "attention",
        "swiglu",
        "cross-entropy",
        "norm",
        "optimizer",
        "elementwise",
        "outside operations",
    ):
        assert f"\n{kind} " in table, kind
    trace = json.loads((place / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_nothing_is_left_of_a_run(printed, place):
    assert sorted(path.name for path in place.iterdir()) == ["config.yaml", "trace.json"]


class Rows(Loader):
    """A run's loader that yields the synthetic rows of the bench."""

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        self._of, self.fingerprints, self.shuffle_settings, self.skipped_shards = (config, mesh), {}, {}, {}
        self.eos_token, self.tokenizer_sha256 = "", "0" * 64

    def find_end(self, step, cursor):
        return Timeline(self._of[0].schedule).total_steps, None

    def batches(self, step, cursor):
        config, mesh = self._of
        timeline = Timeline(config.schedule)
        for now in range(step, timeline.total_steps):
            yield draw_batch(config, timeline.phase_span_at(now).phase, now, mesh)


class Kept:
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def write(self, record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            self.losses[record["step"]] = record["loss"]

    def close(self) -> None:
        pass


def plan_of(words: str, world_size: int) -> tuple[TrainConfig, list[PhasePlan]]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    config: TrainConfig = parse_dataclass(TrainConfig, tree(), "")
    return build_plans(config, parser.parse_args(["no-file", *words.split()]), world_size)


def state(engine: Engine) -> list[dict[str, Tensor]]:
    """Return every rank's weights, and the masters and moments it owns."""
    found = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    for fragment in engine.optimizer_fragments():
        owned = {"master": fragment.master, **fragment.moments}
        found |= {f"{fragment.name} {key}": value.clone() for key, value in owned.items()}
    return ranks.all_gather_objects(found)


def on_two_ranks(folder: Path, config_file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the command's output as one of two tensor-parallel ranks and of two replicas, and `benched_and_trained`."""
    lines = {}
    for name, words in {"tp2": ["parallel.tp_size=2", "run.precision=fp32", *TWICE], "dp2": FEW.split()}.items():
        lines[name], _ = run_bench(str(config_file), *words)
    return lines, benched_and_trained(folder)


def benched_and_trained(folder: Path) -> dict[str, Any]:
    """Return losses and states after the bench's steps, after `train.train_loop` on the same rows, and after other loops."""
    config, [plan] = plan_of(FEW, 2)
    total = plan.num_steps
    others = {
        "trained": config,
        "unclipped": dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_grad_norm=0.0)),
        "other lr": with_peak(config, 2 * config.schedule.lr.peak),
    }
    found: dict[str, Any] = {}
    with mesh_context(1) as mesh, closing(signals.StopSignal()) as stop_signal:
        agreement = Coordinator(mesh, stop_signal)
        engine = build_engine(config, mesh, None)
        stepper = StepContext(config, mesh, Timeline(config.schedule), engine, 1.0, Guard(config.guard))
        line = measure_phase(stepper, plan, 1.0, agreement)
        found["benched"] = (line["first_loss"], line["last_loss"], state(engine))
        for name, other in others.items():
            stopping = dataclasses.replace(other, run=dataclasses.replace(other.run, stop_step=total))
            engine, kept = build_engine(stopping, mesh, None), Kept()
            train_loop(
                RunContext(
                    stopping,
                    mesh,
                    Timeline(stopping.schedule),
                    engine,
                    1.0,
                    Guard(stopping.guard),
                    folder / name,
                    Rows(stopping, mesh),
                    Sinks([kept], 0),
                    CheckpointSaver(folder / name / "checkpoints", mesh, 1),
                    agreement,
                    Watchdog(stopping.watchdog, folder / name, [current_process()], 0, count_collectives),
                    None,
                ),
                Progress(0, {}, None),
            )
            found[name] = (kept.losses[2], kept.losses[4], state(engine))
    return found


def with_peak(config: TrainConfig, peak: float) -> TrainConfig:
    lr = dataclasses.replace(config.schedule.lr, peak=peak)
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, lr=lr))


@pytest.fixture(scope="module")
def two(tmp_path_factory, place) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """The results of both ranks."""
    folder = tmp_path_factory.mktemp("steps")
    return ranks.run(on_two_ranks, 2, folder, folder, place / "config.yaml")


@pytest.fixture(scope="module")
def both(two) -> dict[str, Any]:
    """The results of two replicas, which divide masters and moments between them."""
    return two[0][1]


def test_of_two_tensor_parallel_ranks_the_first_prints_the_line(two, line):
    assert two[1][0] == {"tp2": "", "dp2": ""}
    [only] = two[0][0]["tp2"].splitlines()
    found = json.loads(only)
    assert (found["tp_size"], found["dp_size"], found["num_micro_batches"]) == (2, 1, 2)
    assert found["tokens_per_second_per_device"] == pytest.approx(found["tokens_per_second"] / 2)
    achieved = flops.flops_per_token(one_layer(), 64, causal=False) * found["tokens_per_second"]
    assert found["mfu"] == pytest.approx(achieved / (2 * PEAK_FLOPS))
    # Same rows and weights, other layout and precision: bf16 has eight significant bits for a loss near log(500).
    assert found["first_loss"] == pytest.approx(line["first_loss"], rel=2**-8)


def test_its_steps_are_those_of_the_training_loop(both):
    """Losses of the timed steps, and after the instrumented ones weights, fp32 masters and both moments, are bitwise equal."""
    *losses, benched = both["benched"]
    *expected, trained = both["trained"]
    assert losses == expected
    assert all(math.isfinite(loss) for loss in losses)
    assert [list(ours) for ours in benched] == [list(theirs) for theirs in trained]
    assert [
        (rank, name)
        for rank, (ours, theirs) in enumerate(zip(benched, trained, strict=True))
        for name in ours
        if not torch.equal(ours[name], theirs[name])
    ] == []
    owned = [{name for name in ours if name.endswith("exp_avg")} for ours in benched]
    assert owned[0] != owned[1], "replicas hold different shares of the moments"


def test_the_commands_losses_are_those_of_the_training_loop(two):
    """The command builds its own engine, and it is the trainer's too."""
    lines, found = two[0]
    line = json.loads(lines["dp2"])
    assert (line["tp_size"], line["dp_size"], line["precision"]) == (1, 2, "bf16")
    assert (line["first_loss"], line["last_loss"]) == found["trained"][:2]


@pytest.mark.parametrize("name", ["unclipped", "other lr"])
def test_a_loop_that_differs_is_seen(both, name):
    assert both[name][1] != both["trained"][1]
