"""One step under torch.profiler: a trace in a file, and the time of its operations by kind, from the names alone.

On a GPU the kernels are counted, on a CPU the operations, each without what it calls. Kernels have such names as `_forward`, so
besides its own name the names of the operations around it are looked at, from the inside out.
"""

import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tandem.trainer.distributed.mesh import Mesh

log = logging.getLogger(__name__)
SAYING = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|SumOfGradients|ModelParallelRegion",
    "cross-entropy": r"cross_?entropy|CrossEntropy",
    "attention": r"attention|flash|flex|fmha|cudnn.*sdpa",
    "matmul": r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|baddbmm)_?$",
    "swiglu": r"swiglu",
    "rotary and head norm": r"split_rotated|rope|rotary",
    "norm": r"layer_?norm|LayerNorm|GammaBeta",
    "optimizer": r"[Aa]dam|Optimizer\.step|multi_tensor|_foreach_",
    "embedding": r"embedding|index_?[Ss]elect",
}
"""Kind -> what a name of it contains, the first that fits: names that tell the kind wherever they are found. Attention comes
before matmul, for FlashAttention's kernels are named after CUTLASS too; a product inside another operation is a product."""
GENERAL = {
    "memcpy": r"[Mm]em(cpy|set)|aten::(copy_|_to_copy|clone|contiguous|cat)$|CatArray|direct_copy",
    "elementwise": r"elementwise|[Rr]educe|softmax|triton_(poi|red|per)|"
    r"aten::\w*(add|sub|mul|div|neg|exp|log|sqrt|pow|fill|zero|ones|sum|mean|norm|max|min|where|clamp|sigmoid|lerp|cumsum)\w*$",
}
"""The same for names that do not say what they are done for: they count where nothing around them does."""
OTHER = "other"
SHOWN_NAMES, SHOWN_UNKNOWN_NAMES = 4, 20


@dataclass(frozen=True)
class Spent:
    """All calls of one name in one kind."""

    kind: str
    name: str
    seconds: float
    calls: int


def profiled(step: Callable[[], Any], file: Path, mesh: Mesh) -> dict[str, float]:
    """Make the step; rank 0 writes its Chrome trace to the file and its time by kind to standard error.

    Returns the seconds of each kind, and of the whole step as `step`; nothing on other ranks.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (mesh.device.type == "cuda")
    with profile(activities=activities) if mesh.rank == 0 else nullcontext() as profiler:
        began = time.perf_counter()
        step()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        seconds = time.perf_counter() - began
    if profiler is None:
        return {}
    profiler.export_chrome_trace(str(file))
    spent = by_kind(profiler.events())
    log.info("one step under the profiler, its trace in %s\n%s", file, table(spent, seconds))
    sums = {
        kind: sum(one.seconds for one in spent if one.kind == kind) for kind in dict.fromkeys(one.kind for one in spent)
    }
    return {"step": seconds, **sums}


def kind_of(names: list[str]) -> str:
    """Kind of an operation, given its own name and those around it from the inside out."""
    for patterns in (SAYING, GENERAL):
        for name in names:
            for kind, pattern in patterns.items():
                if re.search(pattern, name):
                    return kind
    return OTHER


def by_kind(events: list[FunctionEvent]) -> list[Spent]:
    """Seconds of every operation without what it calls, or of every kernel where there are kernels; the longest first."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    for names, microseconds in kernels(events) if on_device else operations(events):
        total = totals[kind_of(names), names[0]]
        total[0] += microseconds / 1e6
        total[1] += 1
    found = [Spent(kind, name, seconds, int(calls)) for (kind, name), (seconds, calls) in totals.items()]
    return sorted(found, key=lambda spent: -spent.seconds)


def operations(events: list[FunctionEvent]) -> Iterator[tuple[list[str], float]]:
    """Names of each operation and of those around it, and its own microseconds."""
    for event in events:
        yield names_around(event), event.self_cpu_time_total


def kernels(events: list[FunctionEvent]) -> Iterator[tuple[list[str], float]]:
    """Names of each kernel and of the operations that launched it, if any did, and its microseconds."""
    # What record_function marks on the device is no work.
    on_device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    alone = Counter((event.name, event.time_range.elapsed_us()) for event in on_device)
    for event in events:
        for kernel in event.kernels:
            if alone[kernel.name, kernel.duration] > 0:
                alone[kernel.name, kernel.duration] -= 1
                yield [kernel.name, *names_around(event)], kernel.duration
    for name, microseconds in alone.elements():
        yield [name], microseconds


def names_around(event: FunctionEvent) -> list[str]:
    """Names of the event and of those that called it, from the inside out."""
    names: list[str] = []
    here: FunctionEvent | None = event
    while here is not None:
        names.append(here.name)
        here = here.cpu_parent
    return names


def table(spent: list[Spent], step_seconds: float) -> str:
    """Kinds by their share of the step, the longest names of each below it; what no pattern fits is shown by name."""
    by: dict[str, list[Spent]] = defaultdict(list)
    for one in spent:
        by[one.kind].append(one)
    lines = [f"{'kind':<24}{'share':>7}{'ms':>11}{'calls':>8}   of a step of {1000 * step_seconds:.1f} ms"]
    for kind in sorted(by, key=lambda kind: -sum(one.seconds for one in by[kind])):
        lines.append(row(kind, sum(one.seconds for one in by[kind]), sum(one.calls for one in by[kind]), step_seconds))
        for one in by[kind][: SHOWN_UNKNOWN_NAMES if kind == OTHER else SHOWN_NAMES]:
            lines.append(row(f"  {one.name[:90]}", one.seconds, one.calls, step_seconds))
    busy = sum(one.seconds for one in spent)
    return "\n".join([*lines, row("between them", max(0.0, step_seconds - busy), 0, step_seconds)])


def row(name: str, seconds: float, calls: int, step_seconds: float) -> str:
    numbers = f"{100 * seconds / step_seconds:>6.1f}%{1000 * seconds:>11.2f}{calls:>8}"
    return f"{name:<24}{numbers}" if not name.startswith(" ") else f"{'':<24}{numbers} {name}"
