"""`python -m tandem.trainer.tools.bench.checkpoint_save CONFIG`: what a save costs, beside torch.distributed.checkpoint.

One run on synthetic rows, by the trainer's own steps, saves every so many of them, each time in the next way in turn: so all
ways meet the same machine. The one idea: a save costs what the loop stands still for (its stall) and what the steps beside it
take longer (hidden); whatever moves one into the other is seen. Needs Linux, for /proc.
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

from tandem.trainer import runtime
from tandem.trainer.checkpoint import write
from tandem.trainer.checkpoint.async_save import Saver
from tandem.trainer.checkpoint.layout import folder_name, key
from tandem.trainer.config import RunConfig, UserError, check_world, flops, load
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, barrier, gather_to_all, launched_world_size, started
from tandem.trainer.guard import Guard
from tandem.trainer.metrics.throughput import measured_peak_flops
from tandem.trainer.run_state import Stepper
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.bench.measure import made
from tandem.trainer.tools.bench.plan import resize
from tandem.trainer.tools.bench.synthetic_batch import drawn

log = logging.getLogger(__name__)
NAMES = ("ours", "ours at once", "torch async_save", "torch save")
SAMPLED_EVERY_SECONDS = 0.005


@dataclass(frozen=True)
class Way:
    """One way to save. All ranks call it alike, and `settle` before the next `begin`."""

    begin: Callable[[int], object]
    """The call that the loop makes after a step; what it takes is stall."""
    ended: Callable[[], bool]
    """Whether `settle` would not wait."""
    settle: Callable[[], object]
    """Returns once the checkpoint is on disk."""
    waited_seconds: Callable[[], float] = lambda: 0.0
    """What updates have waited for the save since this was last asked."""
    make_room: Callable[[], object] = lambda: None
    """Removes the checkpoint before; not counted."""


@dataclass
class Cost:
    """Of one save, on one rank."""

    stall_seconds: float
    """The call, updates that waited for the copy, and the wait of the next save for this one."""
    extra_bytes: int
    """Host memory beyond what was there before the save and what a step needs for itself."""
    beside_seconds: list[float] = field(default_factory=list)
    """The steps that began while it was written, without their waiting."""
    alone_seconds: list[float] = field(default_factory=list)
    """The steps after them."""


class Memory:
    """Anonymous and shared memory of this process, sampled by a thread until closed. The page cache is not in it."""

    def __init__(self) -> None:
        self.peak_bytes = self.whole_peak_bytes = resident_bytes()
        self._closed = Event()
        self._thread = Thread(target=self._sample, name="memory", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """The next peak is of what comes."""
        self.peak_bytes = resident_bytes()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLED_EVERY_SECONDS):
            now = resident_bytes()
            self.peak_bytes, self.whole_peak_bytes = max(self.peak_bytes, now), max(self.whole_peak_bytes, now)


def resident_bytes() -> int:
    """Source: proc(5), status; tensors in shared memory count too, mapped files do not."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def ways(engine: Engine, mesh: Mesh, folder: Path, facts: dict[str, Any]) -> dict[str, Way]:
    """By name: ours behind the training, ours with the training waiting, and torch's two, each on the same tensors."""
    saver = Saver(folder / "ours", mesh, keep=1)
    group = dist.new_group(backend="gloo")  # a thread's collectives must not get among those of the training
    running: list[Future[Any]] = []

    def ours_begin(step: int) -> None:
        saver.begin(step, engine, facts)
        saver.take_stall_seconds()  # the call is timed by whoever calls

    def ours_settle() -> None:
        outcome = saver.outcome()
        saver.take_stall_seconds()
        if outcome.error:
            raise UserError(f"--folder: {folder} cannot be written ({outcome.error}); name another")

    def ours_at_once(step: int) -> None:
        ours_begin(step)
        ours_settle()

    def torchs_begin(step: int) -> None:
        place = folder / "torch-async" / folder_name(step)
        running.append(torchs.async_save(state(engine, mesh), checkpoint_id=place, process_group=group))  # type: ignore[arg-type]  # a Future without a stager of one's own

    def torchs_at_once(step: int) -> None:
        torchs.save(state(engine, mesh), checkpoint_id=folder / "torch" / folder_name(step), process_group=group)

    def removed(name: str) -> Callable[[], None]:
        def remove() -> None:
            if mesh.rank == 0:
                shutil.rmtree(folder / name, ignore_errors=True)

        return remove

    return {
        "ours": Way(ours_begin, lambda: saver.ended, ours_settle, saver.take_stall_seconds),
        "ours at once": Way(ours_at_once, lambda: True, lambda: None),
        "torch async_save": Way(
            torchs_begin, lambda: running[-1].done(), lambda: running.pop().result(), make_room=removed("torch-async")
        ),
        "torch save": Way(torchs_at_once, lambda: True, lambda: None, make_room=removed("torch")),
    }


def state(engine: Engine, mesh: Mesh) -> dict[str, Tensor]:
    """What our checkpoint holds of this rank, by the names that it has there."""
    return {
        key(kind, entry["name"], entry["start"]): tensor
        for entry, tensors in write.share_of(engine, mesh)
        for kind, tensor in zip(entry["kinds"], tensors, strict=True)
    }


def one_save(
    way: Way, step_seconds: Callable[[], float], first_step: int, every_steps: int, memory: Memory, step_bytes: int
) -> Cost:
    """The save is made, and so many steps after it; `step_bytes` is what a step needs for a while."""
    way.make_room()
    barrier()
    level = resident_bytes() + step_bytes
    memory.mark()
    began = time.perf_counter()
    way.begin(first_step)
    cost = Cost(time.perf_counter() - began, 0)
    beside = True
    for _ in range(every_steps):
        if beside and way.ended():
            beside, cost.extra_bytes = False, max(0, memory.peak_bytes - level)
        seconds = step_seconds()
        waited = way.waited_seconds()
        cost.stall_seconds += waited
        (cost.beside_seconds if beside else cost.alone_seconds).append(seconds - waited)
    began = time.perf_counter()
    way.settle()
    cost.stall_seconds += time.perf_counter() - began
    if beside:
        cost.extra_bytes = max(0, memory.peak_bytes - level)
    return cost


def measured(stepper: Stepper, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All saves are made, in turns; returns their line."""
    config, mesh = stepper.config, stepper.mesh
    phase, load_before = config.schedule.phases[0], os.getloadavg()
    total_steps = num_steps(arguments)
    batches: Iterator[Batch] = iter([drawn(config, phase, step, mesh) for step in range(total_steps)])
    numbers, at, memory = iter(range(total_steps)), [0], Memory()
    doing = ["warm-up"]

    def step_seconds() -> float:
        at[0] = next(numbers)
        return made(stepper, batches, at[0], doing[0]).step_seconds

    for _ in range(arguments.warmup_steps):
        memory.mark()
        step_seconds()
    step_bytes = memory.peak_bytes - resident_bytes()
    peak_without = memory.whole_peak_bytes
    facts = {**write.model_facts(config.model, config.mup), "cursor": {}, "ledger_lines": 0}
    found = ways(stepper.engine, mesh, folder, facts)
    saved: dict[str, list[Cost]] = {name: [] for name in arguments.ways}
    for _ in range(arguments.saves):
        for name in arguments.ways:
            doing[0] = name
            cost = one_save(found[name], step_seconds, at[0] + 1, arguments.every, memory, step_bytes)
            saved[name].append(cost)
            log.info(
                "%s: stood still %.3f s, %d steps beside, %.2f GB more",
                name, cost.stall_seconds, len(cost.beside_seconds), cost.extra_bytes / 1e9,
            )  # fmt: skip
    memory.close()
    state_bytes = sum(tensor.nbytes for tensor in state(stepper.engine, mesh).values())
    mine = {"saved": saved, "peak": memory.whole_peak_bytes, "without": peak_without, "state": state_bytes}
    ranks: list[dict[str, Any]] = gather_to_all(mine)
    undisturbed = [
        seconds
        for rank in ranks
        for costs in rank["saved"].values()
        for cost in costs
        for seconds in cost.alone_seconds
    ]
    if not undisturbed:
        raise UserError(f"--every: {arguments.every}; each step was beside a save that was being written; raise it")
    alone = median(undisturbed)
    return {
        "config": config.run.name,
        "parameters": flops.parameters(config.model),
        "ranks": mesh.world_size,
        "zero_stage": config.parallel.zero_stage,
        "threads": torch.get_num_threads(),
        "step_tokens": phase.batch_tokens,
        "every_steps": arguments.every,
        "saves": arguments.saves,
        "step_seconds": alone,
        "steps_alone": len(undisturbed) / len(ranks),
        "state_bytes": state_bytes,
        "peak_of_state_without_saves": max(rank["without"] / rank["state"] for rank in ranks),
        "peak_of_state": max(rank["peak"] / rank["state"] for rank in ranks),
        "ways": {name: summed_up([rank["saved"][name] for rank in ranks], ranks, alone) for name in arguments.ways},
        "load_average": [load_before[0], os.getloadavg()[0]],
        "torch": torch.__version__,
    }


def summed_up(by_rank: list[list[Cost]], ranks: list[dict[str, Any]], alone: float) -> dict[str, Any]:
    """One way's saves: of each the rank that it cost most, then the middle and the worst of them."""
    stalls = [max(costs, key=lambda cost: cost.stall_seconds).stall_seconds for costs in zip(*by_rank, strict=True)]
    hidden = [
        max(sum(cost.beside_seconds) - alone * len(cost.beside_seconds) for cost in costs)
        for costs in zip(*by_rank, strict=True)
    ]
    beside = [seconds for costs in by_rank for cost in costs for seconds in cost.beside_seconds]
    extra = [
        max(cost.extra_bytes for cost in costs) / rank["state"] for costs, rank in zip(by_rank, ranks, strict=True)
    ]
    return {
        **{f"stall_seconds_p{part}": float(numpy.percentile(stalls, part)) for part in (50, 99)},
        **{f"stall_of_step_p{part}": float(numpy.percentile(stalls, part)) / alone for part in (50, 99)},
        "steps_beside": len(beside) / len(by_rank) / len(stalls),
        "slowdown_beside": median(beside) / alone - 1 if beside else None,
        "hidden_seconds_p50": median(hidden),
        "cost_seconds_p50": median([stall + more for stall, more in zip(stalls, hidden, strict=True)]),
        "extra_of_state": max(extra),
    }


def num_steps(arguments: argparse.Namespace) -> int:
    return int(arguments.warmup_steps + arguments.saves * len(arguments.ways) * arguments.every)


def sized(config: RunConfig, arguments: argparse.Namespace, world_size: int) -> RunConfig:
    """The config with as many layers as come nearest the parameters asked for, its first phase and the steps that are made.

    Raises: UserError for options that cannot be.
    """
    for name in ("parameters", "saves", "every", "warmup_steps", "rows", "micro_rows", "ranks"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: {given}; must be at least 1; change it")
    model = config.model
    if arguments.parameters:
        one, two = (flops.parameters(replace(model, depth=depth)) for depth in (1, 2))
        model = replace(model, depth=max(1, round(1 + (arguments.parameters - one) / (two - one))))
    phase = resize(config.schedule.phases[0], arguments, max(1, world_size // config.parallel.tp_size))
    phase = replace(phase, tokens=num_steps(arguments) * phase.rows * phase.seq_len)
    schedule = replace(config.schedule, batch_tokens=None, phases=[phase])
    found = replace(config, model=model, schedule=schedule)
    check_world(found, world_size)
    return found


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tandem.trainer.tools.bench.checkpoint_save", description="What a save costs the training."
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run; its corpus is not needed")
    add("overrides", nargs="*", help="section.field=value")
    add("--parameters", type=int, metavar="N", help="of the model, by its depth (default: the config's)")
    add("--every", type=int, default=10, metavar="STEPS", help="from one save to the next (default 10)")
    add("--saves", type=int, default=10, metavar="N", help="in each way (default 10)")
    add("--ways", nargs="+", default=list(NAMES), choices=NAMES, metavar="WAY", help=f"of {'; '.join(NAMES)}")
    add("--warmup-steps", type=int, default=3, metavar="N", help="steps before the first save (default 3)")
    add("--rows", type=int, help="rows of a global step (default: four forward passes on every replica)")
    add("--micro-rows", type=int, help="rows in one forward pass (default: the phase's)")
    add("--ranks", type=int, default=1, metavar="N", help="ranks to start on this machine (default 1)")
    add(
        "--folder",
        type=Path,
        default=Path("runs/bench-saves"),
        metavar="DIR",
        help="where it saves; the newest of each way stays",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints one JSON line on standard output, on rank 0; progress goes to standard error. 2 for a mistake of the user's."""
    arguments = parsed(argv)
    try:
        launched = "RANK" in os.environ
        world_size = launched_world_size() if launched else arguments.ranks
        config = sized(load(arguments.config, arguments.overrides), arguments, world_size)
        if world_size > 1 and not launched:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
            os.execv(
                sys.executable, [sys.executable, *launcher, "-m", "tandem.trainer.tools.bench.checkpoint_save", *argv]
            )
        runtime.stop_with_launcher()
        with started(config.parallel.tp_size) as mesh:
            runtime.start_logging(mesh.rank)
            engine = build_engine(config, mesh, None)
            peak_flops = measured_peak_flops(mesh.device)
            stepper = Stepper(config, mesh, Timeline(config.schedule), engine, peak_flops, Guard(config.guard))
            line = measured(stepper, arguments, arguments.folder)
            if mesh.rank == 0:
                print(json.dumps(line, allow_nan=False), flush=True)
    except UserError as error:
        print(f"tandem.trainer.tools.bench.checkpoint_save: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
