"""Time and memory of a call, and the two ceilings of a device that they are held against.

A call is timed alone: on a GPU by events around it, behind a wait on the device that gives the host a head start. Where the
call's kernels are in the queue by then, what is read is the device's time and not Python's. Calls go round several sets of the
same values, together larger than the L2 cache, so none finds its inputs there. What is compared takes turns, so that a clock
which drifts does so for all. Elsewhere the host's clock is read, which shows that the harness works and nothing about speed.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

L2_BYTES = 50 * 2**20
"""Of an H100 and an H200. Source: NVIDIA H100 whitepaper, table 3."""
HEAD_START_CYCLES = 2_000_000
"""Of the device's clock, about a millisecond: Python launches some dozen kernels meanwhile. Of a call that launches more, and
is not slower itself than its launches, some of Python's time is read too."""
MAX_SETS = 32
STEADY = 0.02
"""Between the 20th and the 80th percentile, relative to the median: below it more repetitions tell nothing new."""

Pass = dict[str, list[float]]
"""Microseconds of each call, by what was timed."""


@dataclass(frozen=True)
class Times:
    """Of one call, in microseconds."""

    percentile_20: float
    percentile_50: float
    percentile_80: float
    repetitions: int

    @property
    def steady(self) -> bool:
        return self.percentile_80 - self.percentile_20 <= STEADY * self.percentile_50


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this process: no operation moves or computes faster."""

    copy_bytes_per_second: float
    """Bytes read and written by a copy much larger than the L2 cache."""
    matmul_flops_per_second: float


def ceilings(device: torch.device) -> Ceilings:
    """Of a copy of 2 GiB and the bf16 product of two matrices of 8,192 x 8,192 on a GPU, of small ones elsewhere."""
    elements, side = (2**30, 8_192) if device.type == "cuda" else (2**22, 256)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def turn(call: Callable[[Any], object]) -> Callable[[], Pass]:
        return lambda: {"": timed(call, [None] * 4, device)}

    found = interleaved([turn(lambda _: target.copy_(source)), turn(lambda _: left @ right)], device)
    copy, matmul = (times[""] for times in found)
    return Ceilings(4e6 * elements / copy.percentile_50, 2e6 * side**3 / matmul.percentile_50)


def interleaved(turns: Sequence[Callable[[], Pass]], device: torch.device) -> list[dict[str, Times]]:
    """What each of `turns` timed, taken in rounds: each once, then each once more.

    The first round is not counted: memory is reserved in it. Rounds end when everything has been called often enough and is
    steady or has had its time. A turn that returns nothing is never taken again, and what it timed is nothing.
    """
    least, seconds = (10, 0.15) if device.type == "cuda" else (3, 0.02)
    passes: list[list[Pass]] = [[] for _ in turns]
    taken = [turn for turn in range(len(turns)) if turns[turn]()]
    end = time.perf_counter() + seconds * len(taken)
    while taken:
        for turn in list(taken):
            if passed := turns[turn]():
                passes[turn].append(passed)
            else:
                taken.remove(turn)
        found = [times for turn in taken for times in _times(passes[turn]).values()]
        often = all(times.repetitions >= least for times in found)
        if often and (time.perf_counter() >= end or all(times.steady for times in found)):
            break
    return [_times(passes[turn]) if turn in taken else {} for turn in range(len(turns))]


def timed(call: Callable[[Any], object], arguments: Sequence[Any], device: torch.device) -> list[float]:
    """Microseconds of the call with each argument."""
    if device.type != "cuda":
        return [_host_microseconds(call, argument) for argument in arguments]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in arguments]
    for argument, (start, end) in zip(arguments, events, strict=True):
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call(argument)
        end.record()
    torch.cuda.synchronize(device)
    return [1e3 * start.elapsed_time(end) for start, end in events]


def num_sets(inputs: Iterable[Tensor]) -> int:
    """As many as together are twice the L2 cache; at least two."""
    size = sum(tensor.nbytes for tensor in inputs)
    return min(max(2, math.ceil(2 * L2_BYTES / size)), MAX_SETS) if any(tensor.is_cuda for tensor in inputs) else 2


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes allocated during the call, its result included, beyond those before it; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _times(passes: list[Pass]) -> dict[str, Times]:
    """Of all passes together."""
    found = {}
    for name in passes[0] if passes else ():
        calls = torch.tensor([*itertools.chain.from_iterable(each[name] for each in passes)], dtype=torch.float64)
        low, middle, high = calls.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        found[name] = Times(low, middle, high, len(calls))
    return found


def _host_microseconds(call: Callable[[Any], object], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return 1e6 * (time.perf_counter() - start)
