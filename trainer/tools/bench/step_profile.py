"""Run one step under torch.profiler, write its trace to a file, and sum the time of its operations by kind.

On a GPU the time is that of kernels, on a CPU that of operations, each without the operations it calls. The kind follows from
the name. Many kernels have names such as `_forward`, so the names of the enclosing operations are matched too, from the inside
out.
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
"""Kind -> pattern of the names, also those of enclosing operations, that determine it. The first match wins. Attention comes
before matmul because the names of FlashAttention's kernels contain CUTLASS too. A matmul in another operation is a matmul."""
GENERIC_PATTERNS = {
    "memcpy": r"[Mm]em(cpy|set)|aten::(copy_|_to_copy|clone|contiguous|cat)$|CatArray|direct_copy",
    "elementwise": r"elementwise|[Rr]educe|softmax|triton_(poi|red|per)|"
    r"aten::\w*(add|sub|mul|div|neg|exp|log|sqrt|pow|fill|zero|ones|sum|mean|norm|max|min|where|clamp|sigmoid|lerp|cumsum)\w*$",
}
"""Patterns of names that do not reveal the purpose. They count only if no enclosing operation matches a specific pattern."""
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
    """Run the step; rank 0 writes its Chrome trace to the file and logs its time by kind.

    Returns the seconds of each kind, and of the whole step as `step`; an empty dict on other ranks.
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
    log.info(f"one step under the profiler, trace in {trace_path}\n{format_table(totals, seconds)}")
    return {"step": seconds, **{kind: sum_seconds(of_kind) for kind, of_kind in group_by_kind(totals).items()}}


def classify_operation(names: list[str]) -> str:
    """Return the kind of an operation, given its name and those of the enclosing operations from the inside out."""
    for patterns in (SPECIFIC_PATTERNS, GENERIC_PATTERNS):
        for name in names:
            for kind, pattern in patterns.items():
                if re.search(pattern, name):
                    return kind
    return OTHER_KIND


def total_operations(events: list[FunctionEvent]) -> list[OperationTotal]:
    """Sum the time by kind and name of kernels, or of operations if there are no kernels. Return the longest first."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    cpu_operations = ((call_stack_names(event), event.self_cpu_time_total) for event in events)
    for names, microseconds in device_kernels(events) if on_device else cpu_operations:
        totals[classify_operation(names), names[0]].append(microseconds)
    found = [OperationTotal(*key, sum(times) / 1e6, len(times)) for key, times in totals.items()]
    return sorted(found, key=lambda total: -total.seconds)


def device_kernels(events: list[FunctionEvent]) -> Iterator[tuple[list[str], float]]:
    """Yield the microseconds of each kernel, with its name and those of the operations that launched it, if any did."""
    # The ranges of record_function on the device are not kernels.
    on_device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    unmatched = Counter((event.name, event.time_range.elapsed_us()) for event in on_device)
    for event in events:
        for kernel in event.kernels:
            if unmatched[kernel.name, kernel.duration] > 0:
                unmatched[kernel.name, kernel.duration] -= 1
                yield [kernel.name, *call_stack_names(event)], kernel.duration
    for name, microseconds in unmatched.elements():
        yield [name], microseconds


def call_stack_names(event: FunctionEvent | None) -> list[str]:
    """Return the names of the event and of its callers, from the inside out."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def group_by_kind(totals: list[OperationTotal]) -> dict[str, list[OperationTotal]]:
    by_kind: dict[str, list[OperationTotal]] = defaultdict(list)
    for total in totals:
        by_kind[total.kind].append(total)
    return by_kind


def sum_seconds(totals: list[OperationTotal]) -> float:
    return sum(total.seconds for total in totals)


def format_table(totals: list[OperationTotal], step_seconds: float) -> str:
    """List the kinds by their share of the step, each with its longest names, and more names of the kind `other`."""

    def row(name: str, seconds: float, num_calls: int) -> str:
        numbers = f"{100 * seconds / step_seconds:>6.1f}%{1000 * seconds:>11.2f}{num_calls:>8}"
        return f"{'':<24}{numbers} {name}" if name.startswith(" ") else f"{name:<24}{numbers}"

    lines = [f"{'kind':<24}{'share':>7}{'ms':>11}{'calls':>8}   of a step of {1000 * step_seconds:.1f} ms"]
    for kind, of_kind in sorted(group_by_kind(totals).items(), key=lambda item: -sum_seconds(item[1])):
        lines.append(row(kind, sum_seconds(of_kind), sum(total.num_calls for total in of_kind)))
        shown = of_kind[: MAX_SHOWN_OTHER_NAMES if kind == OTHER_KIND else MAX_SHOWN_NAMES]
        lines += [row(f"  {total.name[:90]}", total.seconds, total.num_calls) for total in shown]
    return "\n".join([*lines, row("outside operations", max(0.0, step_seconds - sum_seconds(totals)), 0)])
