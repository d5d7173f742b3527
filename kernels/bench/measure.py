"""The time and memory of a call, and the two ceilings of a device.

On a GPU, CUDA events around each call read the device's time. The device first waits for about a millisecond, so that the host
has queued the call's kernels when the first one starts. Calls rotate through copies of the inputs that together exceed the L2
cache, so that no call finds its inputs there. On a CPU the host's clock is read, which shows that the harness works and nothing
about speed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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


class TimingStats(NamedTuple):
    """Percentiles of the time of one call, in microseconds."""

    time_p20_us: float
    time_p50_us: float
    time_p80_us: float
    num_repetitions: int

    @property
    def is_steady(self) -> bool:
        return self.time_p80_us - self.time_p20_us <= MAX_STEADY_SPREAD * self.time_p50_us


class Ceilings(NamedTuple):
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
    copy, matmul = (times[""].time_p50_us for times in found)
    return Ceilings(4e6 * elements / copy, 2e6 * side**3 / matmul)


def time_interleaved(turns: Sequence[Callable[[], PassTimes]], device: torch.device) -> list[dict[str, TimingStats]]:
    """Call all `turns` in rounds, so that a drifting clock affects all alike, and return the statistics of what each one timed.

    The first round does not count, because it reserves memory. Rounds end once every call has enough repetitions and is either
    steady or out of time. A turn that returns nothing has failed: it is not called again and its statistics are empty.
    """
    min_repetitions, seconds = (10, 0.15) if device.type == "cuda" else (3, 0.02)
    passes: dict[int, list[PassTimes]] = {index: [] for index, turn in enumerate(turns) if turn()}
    end = time.perf_counter() + seconds * len(passes)
    while passes:
        for index in list(passes):
            if passed := turns[index]():
                passes[index].append(passed)
            else:
                del passes[index]
        found = [times for of_turn in passes.values() for times in _timing_stats(of_turn).values()]
        is_sampled_enough = all(times.num_repetitions >= min_repetitions for times in found)
        if is_sampled_enough and (time.perf_counter() >= end or all(times.is_steady for times in found)):
            break
    return [_timing_stats(passes.get(index, [])) for index in range(len(turns))]


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
    size = sum(tensor.nbytes for tensor in inputs if tensor.is_cuda)
    return min(max(2, math.ceil(2 * L2_CACHE_BYTES / size)), MAX_INPUT_SETS) if size else 2


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
        calls = torch.tensor([us for times in passes for us in times[name]], dtype=torch.float64)
        low, middle, high = calls.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        found[name] = TimingStats(low, middle, high, len(calls))
    return found


def _host_time_us(call: Callable[[Any], object], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return 1e6 * (time.perf_counter() - start)
