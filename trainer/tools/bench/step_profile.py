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
SPECIFIC_PATTERNS = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|CopyToTP|ModelParallelRegion",
    "cross-entropy": r"cross_?entropy|CrossEntropy",
    "attention": r"attention|flash|flex|fmha|cudnn.*sdpa",
    "matmul": r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|baddbmm)_?$",
    "swiglu": r"swiglu",
    "rotary and head norm": r"split_and_rotate_qkv|rope|rotary",
    "norm": r"layer_?norm|LayerNorm|GammaBeta",
    "optimizer": r"[Aa]dam|Optimizer\.step|multi_tensor|_foreach_",
    "embedding": r"embedding|index_?[Ss]elect",
}
"""Kind -> what a name of it contains, the first that fits: names that tell the kind wherever they are found. Attention comes
before matmul, for FlashAttention's kernels are named after CUTLASS too; a product inside another operation is a product."""
GENERIC_PATTERNS = {
    "memcpy": r"[Mm]em(cpy|set)|aten::(copy_|_to_copy|clone|contiguous|cat)$|CatArray|direct_copy",
    "elementwise": r"elementwise|[Rr]educe|softmax|triton_(poi|red|per)|"
    r"aten::\w*(add|sub|mul|div|neg|exp|log|sqrt|pow|fill|zero|ones|sum|mean|norm|max|min|where|clamp|sigmoid|lerp|cumsum)\w*$",
}
"""The same for names that do not say what they are done for: they count where nothing around them does."""
OTHER_KIND = "other"
MAX_SHOWN_NAMES, MAX_SHOWN_OTHER_NAMES = 4, 20


@dataclass(frozen=True)
class OperationTotal:
    """All calls of one name in one kind."""

    kind: str
    name: str
    seconds: float
    num_calls: int


def profile_step(step: Callable[[], Any], trace_path: Path, mesh: Mesh) -> dict[str, float]:
    """Make the step; rank 0 writes its Chrome trace to the file and its time by kind to standard error.

    Returns the seconds of each kind, and of the whole step as `step`; nothing on other ranks.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (mesh.device.type == "cuda")
    with profile(activities=activities) if mesh.rank == 0 else nullcontext() as profiler:
        start_time = time.perf_counter()
        step()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        seconds = time.perf_counter() - start_time
    if profiler is None:
        return {}
    profiler.export_chrome_trace(str(trace_path))
    totals = total_operations(profiler.events())
    log.info("one step under the profiler, its trace in %s\n%s", trace_path, format_table(totals, seconds))
    seconds_by_kind = {
        kind: sum(one.seconds for one in totals if one.kind == kind)
        for kind in dict.fromkeys(one.kind for one in totals)
    }
    return {"step": seconds, **seconds_by_kind}


def classify_operation(names: list[str]) -> str:
    """Kind of an operation, given its own name and those around it from the inside out."""
    for patterns in (SPECIFIC_PATTERNS, GENERIC_PATTERNS):
        for name in names:
            for kind, pattern in patterns.items():
                if re.search(pattern, name):
                    return kind
    return OTHER_KIND


def total_operations(events: list[FunctionEvent]) -> list[OperationTotal]:
    """Seconds of every operation without what it calls, or of every kernel where there are kernels; the longest first."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    for names, microseconds in device_kernels(events) if on_device else cpu_operations(events):
        total = totals[classify_operation(names), names[0]]
        total[0] += microseconds / 1e6
        total[1] += 1
    operation_totals = [
        OperationTotal(kind, name, seconds, int(calls)) for (kind, name), (seconds, calls) in totals.items()
    ]
    return sorted(operation_totals, key=lambda spent: -spent.seconds)


def cpu_operations(events: list[FunctionEvent]) -> Iterator[tuple[list[str], float]]:
    """Names of each operation and of those around it, and its own microseconds."""
    for event in events:
        yield call_stack_names(event), event.self_cpu_time_total


def device_kernels(events: list[FunctionEvent]) -> Iterator[tuple[list[str], float]]:
    """Names of each kernel and of the operations that launched it, if any did, and its microseconds."""
    # What record_function marks on the device is no work.
    on_device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    unmatched = Counter((event.name, event.time_range.elapsed_us()) for event in on_device)
    for event in events:
        for kernel in event.kernels:
            if unmatched[kernel.name, kernel.duration] > 0:
                unmatched[kernel.name, kernel.duration] -= 1
                yield [kernel.name, *call_stack_names(event)], kernel.duration
    for name, microseconds in unmatched.elements():
        yield [name], microseconds


def call_stack_names(event: FunctionEvent) -> list[str]:
    """Names of the event and of those that called it, from the inside out."""
    names: list[str] = []
    current: FunctionEvent | None = event
    while current is not None:
        names.append(current.name)
        current = current.cpu_parent
    return names


def format_table(totals: list[OperationTotal], step_seconds: float) -> str:
    """Kinds by their share of the step, the longest names of each below it; what no pattern fits is shown by name."""
    totals_by_kind: dict[str, list[OperationTotal]] = defaultdict(list)
    for one in totals:
        totals_by_kind[one.kind].append(one)
    lines = [f"{'kind':<24}{'share':>7}{'ms':>11}{'calls':>8}   of a step of {1000 * step_seconds:.1f} ms"]
    for kind in sorted(totals_by_kind, key=lambda kind: -sum(one.seconds for one in totals_by_kind[kind])):
        lines.append(
            format_row(
                kind,
                sum(one.seconds for one in totals_by_kind[kind]),
                sum(one.num_calls for one in totals_by_kind[kind]),
                step_seconds,
            )
        )
        for one in totals_by_kind[kind][: MAX_SHOWN_OTHER_NAMES if kind == OTHER_KIND else MAX_SHOWN_NAMES]:
            lines.append(format_row(f"  {one.name[:90]}", one.seconds, one.num_calls, step_seconds))
    busy_seconds = sum(one.seconds for one in totals)
    return "\n".join([*lines, format_row("between them", max(0.0, step_seconds - busy_seconds), 0, step_seconds)])


def format_row(name: str, seconds: float, num_calls: int, step_seconds: float) -> str:
    numbers = f"{100 * seconds / step_seconds:>6.1f}%{1000 * seconds:>11.2f}{num_calls:>8}"
    return f"{name:<24}{numbers}" if not name.startswith(" ") else f"{'':<24}{numbers} {name}"
