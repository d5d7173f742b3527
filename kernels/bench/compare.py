"""Rows: every rival of an operation at a shape, on the same values, checked to compute the same before it is timed.

All rivals of a shape are made and checked first and then timed in turns, so that none has the cooler device.
"""

import gc
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tandem.kernels.bench.measure import (
    Ceilings,
    PassTimes,
    TimingStats,
    num_input_sets,
    peak_extra_bytes,
    time_calls,
    time_interleaved,
)
from tandem.kernels.bench.operation import DIRECTIONS, Direction, Example, Function, Operation, Rival, SkipRival

MAX_RELATIVE_DIFFERENCE = 2**-6
"""Of two results, the norm of the difference relative to the norm: four roundings to bf16, half a unit of 2^-7 each. Whoever
rounds every intermediate result stays below it, what computes something else is far above."""
SEED = 5


@dataclass(frozen=True)
class Measurement:
    op: str
    shape: str
    rival: str
    direction: str
    dtype: str
    time_p20_us: float | None
    time_p50_us: float | None
    time_p80_us: float | None
    num_repetitions: int | None
    bytes: int | None
    flops: int | None
    executed_flops: int | None
    gb_per_second: float | None
    tflops_per_second: float | None
    executed_tflops_per_second: float | None
    ceiling: str
    """copy or matmul: what `fraction` is a fraction of; that of a product counts `flops`, not the executed ones."""
    fraction: float | None
    peak_extra_bytes: int | None
    saved_bytes: int | None
    """Storages that forward leaves for backward, inputs among them."""
    note: str
    """Why nothing was measured, or what to know about the figure."""
    device: str
    torch: str
    triton: str
    commit: str


@dataclass
class PreparedRival:
    """A rival at a shape: what it is timed with, and what is known of it without a clock."""

    shape: Any
    function: Function
    input_sets: list[Example]
    """The same values, in memory of their own."""
    saved_bytes: int
    overwrites_inputs: bool
    """Its inputs, which then are written anew after each turn."""
    note: str
    failure: str = ""
    """Why there is no figure of it."""


def measure_rivals(
    op: Operation,
    shape: Any,
    device: torch.device,
    ceilings: Ceilings,
    is_selected: Callable[[str], bool] = lambda name: True,
    *,
    deadline: float = math.inf,
) -> Iterator[Measurement]:
    """One for each direction of each wanted rival that runs, and one with the reason for each that does not.

    Nothing new is begun after the deadline, a moment of time.monotonic(); what has begun is measured.
    """
    if time.monotonic() >= deadline:
        yield _measurement(op, shape, "all", device, direction="all", note="not measured: left out, time was over")
        return
    # What was compiled for another shape would make the next one compile for all shapes at once.
    torch._dynamo.reset()
    contestants = _prepare_rivals(op, shape, device, is_selected, deadline)
    running = {rival: one for rival, one in contestants.items() if not one.failure}
    timing_stats = time_interleaved([_timed_turn(one, device) for one in running.values()], device)
    times = dict(zip(running, timing_stats, strict=True))
    for rival, one in contestants.items():
        measured = []
        try:
            measured = [*_measure_directions(op, one, times[rival], ceilings, device)] if times.get(rival) else []
        except Exception as reason:
            one.failure = one_line_reason(reason)
        for direction_figures in measured:
            yield _measurement(
                op, shape, rival, device, **direction_figures, saved_bytes=one.saved_bytes, note=one.note
            )
        if one.failure:
            yield _measurement(op, shape, rival, device, direction="all", note=f"not measured: {one.failure}")


def _prepare_rivals(
    op: Operation, shape: Any, device: torch.device, is_selected: Callable[[str], bool], deadline: float
) -> dict[str, PreparedRival]:
    """Of each wanted rival, with the reason where it cannot be one."""
    example = seeded_example(op.make_example, shape, device)
    sets: list[Example] = []
    reference: tuple[str, list[Tensor]] | None = None
    found = {}
    for rival in op.rivals:
        if reference is not None and not is_selected(rival.name):
            continue
        one = PreparedRival(shape, lambda: (), [], 0, False, "")
        try:
            if time.monotonic() >= deadline:
                raise SkipRival("left out, time was over")
            one.shape = rival.substitute_shape(shape)
            comparable = rival.make_example is None and one.shape == shape
            rival_example = (
                example if comparable else seeded_example(rival.make_example or op.make_example, one.shape, device)
            )
            one.function = rival_function(rival, one.shape, device)
            values, one.saved_bytes, one.overwrites_inputs = run_forward_backward(one.function, rival_example)
            check_agreement(reference if comparable else None, values)
            if comparable:
                reference = reference or (rival.name, values)
            del values
            if is_selected(rival.name):
                sets = sets or _input_sets(example)
                one.input_sets = sets if comparable else _input_sets(rival_example)
            notes = ["" if comparable else rival.deviation, "overwrites its inputs" if one.overwrites_inputs else ""]
            one.note = "; ".join(filter(None, notes))
        # Of any kind: rivals are not ours, and nobody's figures may be lost with one of them.
        except Exception as reason:
            one.failure = one_line_reason(reason)
        if is_selected(rival.name):
            found[rival.name] = one
        _free_memory()
    return found


def _timed_turn(one: PreparedRival, device: torch.device) -> Callable[[], PassTimes]:
    """Times both directions with each set; nothing once it has failed. All go forward before any goes back.

    Both directions together are the sum for each set: a backward has to follow a forward anyway.
    """
    before = [tensor.detach().clone() for tensor in one.input_sets[0].inputs] if one.overwrites_inputs else []

    def turn() -> PassTimes:
        ready: list[tuple[Example, tuple[Tensor, ...]]] = []
        try:
            forward = time_calls(
                lambda values: ready.append((values, _as_tuple(one.function(*values.inputs)))), one.input_sets, device
            )
            backward = time_calls(lambda pair: _backward_gradients(pair[1], pair[0]), ready, device)
        except Exception as reason:
            one.failure = one_line_reason(reason)
            ready.clear()
            _free_memory()
            return {}
        finally:
            for values in one.input_sets if one.overwrites_inputs else ():
                _restore_inputs(values, before)
        both = [sum(pair) for pair in zip(forward, backward, strict=True)]
        return {"forward": forward, "backward": backward, "forward+backward": both}

    return turn


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _input_sets(example: Example) -> list[Example]:
    return [example] + [
        _copy_example(example) for _ in range(1, num_input_sets((*example.inputs, *example.out_gradients)))
    ]


def seeded_example(make: Callable[..., Example], shape: Any, device: torch.device) -> Example:
    return make(shape, device, shape.dtype, torch.Generator(device).manual_seed(SEED))


def rival_function(rival: Rival, shape: Any, device: torch.device) -> Function:
    if rival.needs_gpu and device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise SkipRival("needs a GPU")
    return rival.make_function(shape)


def run_forward_backward(function: Function, example: Example) -> tuple[list[Tensor], int, bool]:
    """Results and gradients, bytes kept between them, whether inputs were overwritten; they are as before afterwards."""
    before = [tensor.detach().clone() for tensor in example.inputs]
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = _as_tuple(function(*example.inputs))
        tensors = [output.detach().clone() for output in outputs]
        tensors += [gradient.clone() for gradient in _backward_gradients(outputs, example)]
        overwrites = not all(torch.equal(a, b) for a, b in zip(before, example.inputs, strict=True))
    finally:
        _restore_inputs(example, before)
    return tensors, sum(storages.values()), overwrites


def check_agreement(reference: tuple[str, list[Tensor]] | None, actual: list[Tensor]) -> None:
    """Raises: SkipRival where a result is not finite, or differs from the first rival's by more than rounding."""
    if not all(tensor.isfinite().all() for tensor in actual):
        raise SkipRival("a result is not finite")
    if reference is None:
        return
    name, expected = reference
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        raise SkipRival(f"its results have other shapes than those of {name}")
    for index, (expected_tensor, actual_tensor) in enumerate(zip(expected, actual, strict=True)):
        difference = (
            torch.linalg.vector_norm(actual_tensor.float() - expected_tensor.float()) / expected_tensor.float().norm()
        ).item()
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            raise SkipRival(
                f"result {index} differs from that of {name} by {difference:.2g} of its norm, more than "
                f"{MAX_RELATIVE_DIFFERENCE:.2g}"
            )


def _measure_directions(
    op: Operation, one: PreparedRival, times: dict[str, TimingStats], ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What is measured of each direction."""
    values = one.input_sets[0]
    before = [tensor.detach().clone() for tensor in values.inputs] if one.overwrites_inputs else []

    def forward() -> tuple[Tensor, ...]:
        return _as_tuple(one.function(*values.inputs))

    for direction in DIRECTIONS:
        ready = forward() if direction == "backward" else ()
        calls: dict[Direction, Callable[[], object]] = {
            "forward": forward,
            "backward": lambda: _backward_gradients(ready, values),  # noqa: B023, called in this turn of the loop
            "forward+backward": lambda: _backward_gradients(forward(), values),
        }
        peak = peak_extra_bytes(calls[direction], device)
        if one.overwrites_inputs:
            _restore_inputs(values, before)
        timing = times[direction]
        yield {
            "direction": direction,
            "time_p20_us": timing.p20_us,
            "time_p50_us": timing.p50_us,
            "time_p80_us": timing.p80_us,
            "num_repetitions": timing.num_repetitions,
            "peak_extra_bytes": peak,
            **_rates(op, one.shape, direction, timing.p50_us, ceilings),
        }


def _rates(op: Operation, shape: Any, direction: Direction, microseconds: float, ceilings: Ceilings) -> dict[str, Any]:
    work = op.work(shape, direction, shape.dtype.itemsize)
    bytes_per_second, flops_per_second = 1e6 * work.bytes / microseconds, 1e6 * work.flops / microseconds
    by_copy = bytes_per_second / ceilings.copy_bytes_per_second
    by_matmul = flops_per_second / ceilings.matmul_flops_per_second
    return {
        **asdict(work),
        "gb_per_second": bytes_per_second / 1e9,
        "tflops_per_second": flops_per_second / 1e12,
        "executed_tflops_per_second": work.executed_flops / microseconds / 1e6,
        "fraction": by_copy if op.ceiling == "copy" else by_matmul,
    }


def _measurement(op: Operation, shape: Any, rival: str, device: torch.device, **known: Any) -> Measurement:
    fields: dict[str, Any] = dict.fromkeys(Measurement.__dataclass_fields__) | known | environment(device_name(device))
    fields |= {"op": op.name, "shape": shape.name, "rival": rival, "ceiling": op.ceiling}
    return Measurement(**(fields | {"dtype": str(shape.dtype).removeprefix("torch.")}))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: str) -> dict[str, str]:
    """What a figure means nothing without."""
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": git_commit()}


@cache
def git_commit() -> str:
    """Of the checkout these files are in, with a plus where files of it have changed since.

    Where git is absent, or these files are in no checkout, the variable TANDEM_COMMIT as it is; without it "no checkout".
    """
    root = Path(__file__).resolve().parents[2]
    try:
        outputs = [
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "kernels"))
        ]
    except OSError:
        outputs = []
    if not outputs or outputs[0].returncode:
        return os.environ.get("TANDEM_COMMIT") or "no checkout"
    return outputs[0].stdout.strip() + ("+" if outputs[1].stdout else "")


def _backward_gradients(outputs: tuple[Tensor, ...], example: Example) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, example.inputs_with_grad, example.out_gradients)


def _copy_example(example: Example) -> Example:
    return Example(
        tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in example.inputs),
        tuple(tensor.clone() for tensor in example.out_gradients),
    )


@torch.no_grad()
def _restore_inputs(example: Example, before: list[Tensor]) -> None:
    for tensor, value in zip(example.inputs, before, strict=True):
        tensor.copy_(value)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def one_line_reason(reason: Exception) -> str:
    """In one line."""
    first = (str(reason).strip().splitlines() or [""])[0]
    return (first if isinstance(reason, SkipRival) else f"{type(reason).__name__}: {first}")[:200]
