"""`python -m tests.rivals.trainer.checkpoint_save CONFIG`: what a save costs, compared with torch.distributed.checkpoint.

One run trains on synthetic rows with the trainer's own steps and saves at regular intervals. The ways to save take turns, so
that all of them meet the same machine. The cost of a save has two parts: the time during which the loop stands still (stall),
and the time that the steps beside the save lose (hidden). Measuring both shows work that only moves from one to the other.
Needs Linux, for /proc.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as torchs

from tandem.trainer.checkpoint import write
from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.checkpoint.layout import fragment_key, model_metadata, step_folder_name
from tandem.trainer.config import TrainConfig, UserError, check_world_size, flops, load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, barrier, mesh_context
from tandem.trainer.guard import Guard
from tandem.trainer.metrics.throughput import measure_peak_flops
from tandem.trainer.run_state import StepContext
from tandem.trainer.runtime import process
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.bench.measure import run_step
from tandem.trainer.tools.bench.plan import check_minimums, resize_phase
from tandem.trainer.tools.bench.synthetic_batch import draw_batch
from tests.ranks import all_gather_objects

log = logging.getLogger(__name__)
METHOD_NAMES = ("ours", "ours blocking", "torch async_save", "torch save")
SAMPLE_INTERVAL_SECONDS = 0.005


@dataclass(frozen=True)
class SaveMethod:
    """One way to save. All ranks call the same functions, and `wait_for_save` before the next `start_save`."""

    start_save: Callable[[int], object]
    """Starts the save of a step. Its duration is stall."""
    is_save_finished: Callable[[], bool]
    """Whether `wait_for_save` would return at once."""
    wait_for_save: Callable[[], object]
    """Returns once the checkpoint is on disk."""
    pop_stall_seconds: Callable[[], float] = lambda: 0.0
    """Returns how long updates have waited for the save since the last call."""
    remove_previous: Callable[[], object] = lambda: None
    """Removes the previous checkpoint; not counted."""


@dataclass
class SaveCost:
    """The cost of one save on one rank."""

    stall_seconds: float
    """The call, the wait of updates for the copy, and the wait of the next save for this one."""
    extra_bytes: int
    """Host memory above the level before the save and above what a step itself needs."""
    overlapping_step_seconds: list[float] = field(default_factory=list)
    """The steps that began while the save was written, without their stalls."""
    undisturbed_step_seconds: list[float] = field(default_factory=list)
    """The steps after them."""


class HostMemorySampler:
    """Samples anonymous and shared memory of this process in a thread until closed. The page cache does not count."""

    def __init__(self) -> None:
        self.peak_bytes = self.process_peak_bytes = resident_bytes()
        self._closed = Event()
        self._thread = Thread(target=self._sample, name="memory", daemon=True)
        self._thread.start()

    def reset_peak(self) -> None:
        """Start a new peak."""
        self.peak_bytes = resident_bytes()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_INTERVAL_SECONDS):
            current_bytes = resident_bytes()
            self.peak_bytes, self.process_peak_bytes = (
                max(self.peak_bytes, current_bytes),
                max(self.process_peak_bytes, current_bytes),
            )


def resident_bytes() -> int:
    """Return anonymous and shared memory, without mapped files. Source: proc(5), status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def build_save_methods(engine: Engine, mesh: Mesh, folder: Path, facts: dict[str, Any]) -> dict[str, SaveMethod]:
    """Return ours in the background, ours with training waiting, and torch's two ways, all on the same tensors."""
    saver = CheckpointSaver(folder / "ours", mesh, keep_last=1)
    group = dist.new_group(backend="gloo")  # keeps a thread's collectives apart from the training's
    pending: list[Future[Any]] = []

    def start_ours(step: int) -> None:
        saver.start_save(step, engine, facts)
        saver.pop_stall_seconds()  # the caller times the call

    def wait_for_ours() -> None:
        outcome = saver.wait_for_result()
        saver.pop_stall_seconds()
        if outcome.error:
            raise UserError(f"--folder: {folder} cannot be written ({outcome.error}); use another")

    def save_ours_blocking(step: int) -> None:
        start_ours(step)
        wait_for_ours()

    def start_torch_async(step: int) -> None:
        place = folder / "torch-async" / step_folder_name(step)
        pending.append(torchs.async_save(state_tensors(engine, mesh), checkpoint_id=place, process_group=group))

    def save_torch(step: int) -> None:
        torchs.save(
            state_tensors(engine, mesh), checkpoint_id=folder / "torch" / step_folder_name(step), process_group=group
        )

    def make_remover(name: str) -> Callable[[], None]:
        def remove() -> None:
            if mesh.rank == 0:
                shutil.rmtree(folder / name, ignore_errors=True)

        return remove

    return {
        "ours": SaveMethod(start_ours, lambda: saver.pending_result.done(), wait_for_ours, saver.pop_stall_seconds),
        "ours blocking": SaveMethod(save_ours_blocking, lambda: True, lambda: None),
        "torch async_save": SaveMethod(
            start_torch_async,
            lambda: pending[-1].done(),
            lambda: pending.pop().result(),
            remove_previous=make_remover("torch-async"),
        ),
        "torch save": SaveMethod(save_torch, lambda: True, lambda: None, remove_previous=make_remover("torch")),
    }


def state_tensors(engine: Engine, mesh: Mesh) -> dict[str, Tensor]:
    """Return the tensors that our checkpoint stores for this rank, by their names there."""
    entries, tensors = write.rank_fragments(engine, mesh)
    keys = [fragment_key(kind, entry["name"], entry["start"]) for entry in entries for kind in entry["kinds"]]
    return dict(zip(keys, tensors, strict=True))


def measure_save(
    method: SaveMethod,
    run_timed_step: Callable[[], float],
    step: int,
    every_steps: int,
    sampler: HostMemorySampler,
    transient_step_bytes: int,
) -> SaveCost:
    """Make a save and `every_steps` steps after it. `transient_step_bytes` is the memory that a step allocates and frees."""
    method.remove_previous()
    barrier()
    baseline_bytes = resident_bytes() + transient_step_bytes
    sampler.reset_peak()
    start_time = time.perf_counter()
    method.start_save(step)
    cost = SaveCost(time.perf_counter() - start_time, 0)
    is_saving = True
    for _ in range(every_steps):
        if is_saving and method.is_save_finished():
            is_saving, cost.extra_bytes = False, max(0, sampler.peak_bytes - baseline_bytes)
        seconds = run_timed_step()
        stall_seconds = method.pop_stall_seconds()
        cost.stall_seconds += stall_seconds
        (cost.overlapping_step_seconds if is_saving else cost.undisturbed_step_seconds).append(seconds - stall_seconds)
    start_time = time.perf_counter()
    method.wait_for_save()
    cost.stall_seconds += time.perf_counter() - start_time
    if is_saving:
        cost.extra_bytes = max(0, sampler.peak_bytes - baseline_bytes)
    return cost


def measure(context: StepContext, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make all saves in turns and return the JSON line."""
    config, mesh = context.config, context.mesh
    phase, load_before = config.schedule.phases[0], os.getloadavg()
    total_steps = count_steps(arguments)
    batches: Iterator[Batch] = iter([draw_batch(config, phase, step, mesh) for step in range(total_steps)])
    numbers, current_step, sampler = iter(range(total_steps)), [0], HostMemorySampler()
    label = ["warm-up"]

    def run_timed_step() -> float:
        current_step[0] = next(numbers)
        return run_step(context, batches, current_step[0], label[0]).step_seconds

    for _ in range(arguments.warmup_steps):
        sampler.reset_peak()
        run_timed_step()
    step_bytes = sampler.peak_bytes - resident_bytes()
    peak_bytes_without_saves = sampler.process_peak_bytes
    facts = {**model_metadata(config.model, config.mup), "cursor": {}, "num_ledger_lines": 0}
    methods = build_save_methods(context.engine, mesh, folder, facts)
    saved: dict[str, list[SaveCost]] = {name: [] for name in arguments.ways}
    for _ in range(arguments.saves):
        for name in arguments.ways:
            label[0] = name
            cost = measure_save(
                methods[name], run_timed_step, current_step[0] + 1, arguments.every, sampler, step_bytes
            )
            saved[name].append(cost)
            log.info(
                "%s: stalled %.3f s, %d steps beside the save, %.2f GB more",
                name, cost.stall_seconds, len(cost.overlapping_step_seconds), cost.extra_bytes / 1e9,
            )  # fmt: skip
    sampler.close()
    state_bytes = sum(tensor.nbytes for tensor in state_tensors(context.engine, mesh).values())
    local_result = {
        "saved": saved,
        "peak": sampler.process_peak_bytes,
        "without": peak_bytes_without_saves,
        "state": state_bytes,
    }
    ranks: list[dict[str, Any]] = all_gather_objects(local_result)
    undisturbed_step_seconds = [
        seconds
        for rank in ranks
        for costs in rank["saved"].values()
        for cost in costs
        for seconds in cost.undisturbed_step_seconds
    ]
    if not undisturbed_step_seconds:
        raise UserError(f"--every: {arguments.every} leaves no step without a save beside it; use more")
    undisturbed_seconds = median(undisturbed_step_seconds)
    return {
        "config": config.run.name,
        "num_parameters": flops.num_parameters(config.model),
        "world_size": mesh.world_size,
        "zero_stage": config.parallel.zero_stage,
        "num_threads": torch.get_num_threads(),
        "tokens_per_step": phase.tokens_per_step,
        "every_steps": arguments.every,
        "num_saves": arguments.saves,
        "step_seconds": undisturbed_seconds,
        "undisturbed_steps": len(undisturbed_step_seconds) / len(ranks),
        "state_bytes": state_bytes,
        "peak_state_ratio_without_saves": max(rank["without"] / rank["state"] for rank in ranks),
        "peak_state_ratio": max(rank["peak"] / rank["state"] for rank in ranks),
        "methods": {
            name: summarize_costs([rank["saved"][name] for rank in ranks], ranks, undisturbed_seconds)
            for name in arguments.ways
        },
        "load_average": [load_before[0], os.getloadavg()[0]],
        "torch": torch.__version__,
    }


def summarize_costs(
    costs_by_rank: list[list[SaveCost]], ranks: list[dict[str, Any]], undisturbed_seconds: float
) -> dict[str, Any]:
    """Summarise one way's saves: take the slowest rank of each save, then the median and the 99th percentile."""
    stall_seconds = [
        max(costs, key=lambda cost: cost.stall_seconds).stall_seconds for costs in zip(*costs_by_rank, strict=True)
    ]
    hidden_seconds = [
        max(
            sum(cost.overlapping_step_seconds) - undisturbed_seconds * len(cost.overlapping_step_seconds)
            for cost in costs
        )
        for costs in zip(*costs_by_rank, strict=True)
    ]
    overlapping_step_seconds = [
        seconds for costs in costs_by_rank for cost in costs for seconds in cost.overlapping_step_seconds
    ]
    extra_fractions = [
        max(cost.extra_bytes for cost in costs) / rank["state"]
        for costs, rank in zip(costs_by_rank, ranks, strict=True)
    ]
    return {
        **{f"stall_seconds_p{part}": float(numpy.percentile(stall_seconds, part)) for part in (50, 99)},
        **{
            f"stall_of_step_p{part}": float(numpy.percentile(stall_seconds, part)) / undisturbed_seconds
            for part in (50, 99)
        },
        "overlapping_steps": len(overlapping_step_seconds) / len(costs_by_rank) / len(stall_seconds),
        "overlapping_slowdown": median(overlapping_step_seconds) / undisturbed_seconds - 1
        if overlapping_step_seconds
        else None,
        "hidden_seconds_p50": median(hidden_seconds),
        "cost_seconds_p50": median([stall + more for stall, more in zip(stall_seconds, hidden_seconds, strict=True)]),
        "extra_state_ratio": max(extra_fractions),
    }


def count_steps(arguments: argparse.Namespace) -> int:
    return int(arguments.warmup_steps + arguments.saves * len(arguments.ways) * arguments.every)


def build_config(config: TrainConfig, arguments: argparse.Namespace, world_size: int) -> TrainConfig:
    """Return the config with the depth that comes nearest to `--parameters`, its first phase, and as many steps as are made.

    Raises: UserError if an option is invalid.
    """
    options = ("parameters", "saves", "every", "warmup_steps", "global_batch_size", "micro_batch_size", "ranks")
    check_minimums(arguments, dict.fromkeys(options, 1))
    model = config.model
    if arguments.parameters:
        one, two = (flops.num_parameters(replace(model, num_layers=depth)) for depth in (1, 2))
        model = replace(model, num_layers=max(1, round(1 + (arguments.parameters - one) / (two - one))))
    phase = resize_phase(config.schedule.phases[0], arguments, max(1, world_size // config.parallel.tp_size))
    phase = replace(phase, tokens=count_steps(arguments) * phase.global_batch_size * phase.seq_len)
    schedule = replace(config.schedule, tokens_per_step=None, phases=[phase])
    bench_config = replace(config, model=model, schedule=schedule)
    check_world_size(bench_config, world_size)
    return bench_config


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tests.rivals.trainer.checkpoint_save", description="Measure what a save costs the training."
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run; its corpus is not read")
    add("overrides", nargs="*", help="section.field=value")
    add("--parameters", type=int, metavar="N", help="parameters of the model, set by its depth (default: the config's)")
    add("--every", type=int, default=10, metavar="STEPS", help="steps from one save to the next (default: 10)")
    add("--saves", type=int, default=10, metavar="N", help="saves in each way (default: 10)")
    add(
        "--ways",
        nargs="+",
        default=list(METHOD_NAMES),
        choices=METHOD_NAMES,
        metavar="WAY",
        help=f"some of {'; '.join(METHOD_NAMES)} (default: all)",
    )
    add("--warmup-steps", type=int, default=3, metavar="N", help="steps before the first save (default: 3)")
    add("--global-batch-size", type=int, help="rows of a global step (default: 4 micro-batches on every replica)")
    add("--micro-batch-size", type=int, help="rows of a micro-batch (default: the phase's)")
    add("--ranks", type=int, default=1, metavar="N", help="ranks to start on this machine (default: 1)")
    add(
        "--folder",
        type=Path,
        default=Path("runs/bench-saves"),
        metavar="DIR",
        help="folder of the saves; the newest of each way stays",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print one JSON line on rank 0's standard output, and progress on standard error. Returns 2 if the user made a mistake."""
    arguments = parse_arguments(argv)
    try:
        launched = "RANK" in os.environ
        world_size = current_launch().world_size if launched else arguments.ranks
        config = build_config(load_config(arguments.config, arguments.overrides), arguments, world_size)
        if world_size > 1 and not launched:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
            os.execv(sys.executable, [sys.executable, *launcher, "-m", "tests.rivals.trainer.checkpoint_save", *argv])
        process.set_parent_death_signal()
        with mesh_context(config.parallel.tp_size) as mesh:
            process.start_logging(mesh.rank)
            engine = build_engine(config, mesh, None)
            peak_flops = measure_peak_flops(mesh.device)
            context = StepContext(config, mesh, Timeline(config.schedule), engine, peak_flops, Guard(config.guard))
            result = measure(context, arguments, arguments.folder)
            if mesh.rank == 0:
                print(json.dumps(result, allow_nan=False), flush=True)
    except UserError as error:
        print(f"tests.rivals.trainer.checkpoint_save: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
