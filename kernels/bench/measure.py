"""The time and memory of a call, and the two ceilings of a device.

On a GPU, CUDA events around each call read the device's time. The device first waits for about a millisecond, so that the host
has queued the call's kernels when the first one starts. Calls rotate through copies of the inputs that together exceed the L2
cache, so that no call finds its inputs there. Rivals take turns, so that a drifting clock affects all of them alike. On a CPU
the host's clock is read, which shows that the harness works and nothing about speed.
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
"""About a millisecond of the device's clock, in which Python launches some dozen kernels. If a call launches more, and the
launches take longer than the kernels, its time includes some of Python's."""
MAX_INPUT_SETS = 32
MAX_STEADY_SPREAD = 0.02
"""From the 20th to the 80th percentile, relative to the median. More repetitions add nothing to a smaller spread."""

PassTimes = dict[str, list[float]]
"""Microseconds of each call, by what was timed."""


@dataclass(frozen=True)
class TimingStats:
    """Percentiles of the time of one call, in microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float
    num_repetitions: int

    @property
    def is_steady(self) -> bool:
        return self.p80_us - self.p20_us <= MAX_STEADY_SPREAD * self.p50_us


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this process."""

    copy_bytes_per_second: float
    """Bytes read plus bytes written by a copy much larger than the L2 cache."""
    matmul_flops_per_second: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Time a copy of 2 GiB and the bf16 product of two 8,192 x 8,192 matrices; small ones on a CPU."""
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
    """Call all `turns` in rounds and return the statistics of what each one timed.

    The first round does not count, because it reserves memory. Rounds end once every call has enough repetitions and is either
    steady or out of time. A turn that returns nothing has failed: it is not called again and its statistics are empty.
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
    """How many copies of the inputs are twice the size of the L2 cache; at least two."""
    tensors = list(inputs)
    if not any(tensor.is_cuda for tensor in tensors):
        return 2
    size = sum(tensor.nbytes for tensor in tensors)
    return min(max(2, math.ceil(2 * L2_CACHE_BYTES / size)), MAX_INPUT_SETS)


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory allocated during the call, including its result, beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _timing_stats(passes: list[PassTimes]) -> dict[str, TimingStats]:
    """The statistics of all passes together."""
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
