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

L2_CACHE_BYTES = 50 * 2**20
"""Of an H100 and an H200. Source: NVIDIA H100 whitepaper, table 3."""
HEAD_START_CYCLES = 2_000_000
"""Of the device's clock, about a millisecond: Python launches some dozen kernels meanwhile. Of a call that launches more, and
is not slower itself than its launches, some of Python's time is read too."""
MAX_INPUT_SETS = 32
MAX_STEADY_SPREAD = 0.02
"""Between the 20th and the 80th percentile, relative to the median: below it more repetitions tell nothing new."""

PassTimes = dict[str, list[float]]
"""Microseconds of each call, by what was timed."""


@dataclass(frozen=True)
class TimingStats:
    """Of one call, in microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float
    num_repetitions: int

    @property
    def is_steady(self) -> bool:
        return self.p80_us - self.p20_us <= MAX_STEADY_SPREAD * self.p50_us


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this process: no operation moves or computes faster."""

    copy_bytes_per_second: float
    """Bytes read and written by a copy much larger than the L2 cache."""
    matmul_flops_per_second: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Of a copy of 2 GiB and the bf16 product of two matrices of 8,192 x 8,192 on a GPU, of small ones elsewhere."""
    elements, side = (2**30, 8_192) if device.type == "cuda" else (2**22, 256)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def turn(call: Callable[[Any], object]) -> Callable[[], PassTimes]:
        return lambda: {"": time_calls(call, [None] * 4, device)}

    found = time_interleaved([turn(lambda _: target.copy_(source)), turn(lambda _: left @ right)], device)
    copy, matmul = (times[""] for times in found)
    return Ceilings(4e6 * elements / copy.p50_us, 2e6 * side**3 / matmul.p50_us)


def time_interleaved(turns: Sequence[Callable[[], PassTimes]], device: torch.device) -> list[dict[str, TimingStats]]:
    """What each of `turns` timed, taken in rounds: each once, then each once more.

    The first round is not counted: memory is reserved in it. Rounds end when everything has been called often enough and is
    steady or has had its time. A turn that returns nothing is never taken again, and what it timed is nothing.
    """
    min_repetitions, seconds = (10, 0.15) if device.type == "cuda" else (3, 0.02)
    passes: list[list[PassTimes]] = [[] for _ in turns]
    active_turns = [turn for turn in range(len(turns)) if turns[turn]()]
    end = time.perf_counter() + seconds * len(active_turns)
    while active_turns:
        for turn in list(active_turns):
            if passed := turns[turn]():
                passes[turn].append(passed)
            else:
                active_turns.remove(turn)
        found = [times for turn in active_turns for times in _timing_stats(passes[turn]).values()]
        is_sampled_enough = all(times.num_repetitions >= min_repetitions for times in found)
        if is_sampled_enough and (time.perf_counter() >= end or all(times.is_steady for times in found)):
            break
    return [_timing_stats(passes[turn]) if turn in active_turns else {} for turn in range(len(turns))]


def time_calls(call: Callable[[Any], object], arguments: Sequence[Any], device: torch.device) -> list[float]:
    """Microseconds of the call with each argument."""
    if device.type != "cuda":
        return [_host_time_us(call, argument) for argument in arguments]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in arguments]
    for argument, (start, end) in zip(arguments, events, strict=True):
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call(argument)
        end.record()
    torch.cuda.synchronize(device)
    return [1e3 * start.elapsed_time(end) for start, end in events]


def num_input_sets(inputs: Iterable[Tensor]) -> int:
    """As many as together are twice the L2 cache; at least two."""
    size = sum(tensor.nbytes for tensor in inputs)
    return (
        min(max(2, math.ceil(2 * L2_CACHE_BYTES / size)), MAX_INPUT_SETS)
        if any(tensor.is_cuda for tensor in inputs)
        else 2
    )


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


def _timing_stats(passes: list[PassTimes]) -> dict[str, TimingStats]:
    """Of all passes together."""
    found = {}
    for name in passes[0] if passes else ():
        calls = torch.tensor([*itertools.chain.from_iterable(each[name] for each in passes)], dtype=torch.float64)
        low, middle, high = calls.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        found[name] = TimingStats(low, middle, high, len(calls))
    return found


def _host_time_us(call: Callable[[Any], object], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return 1e6 * (time.perf_counter() - start)
