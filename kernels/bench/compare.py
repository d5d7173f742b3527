"""Measure our implementation of an operation and plain torch's at a shape, on the same values, if their results agree."""

import copy
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tandem.kernels.bench import measure
from tandem.kernels.bench.measure import Ceilings, PassTimes, TimingStats
from tandem.kernels.bench.ops import Example, Function, Operation, Work
from tandem.kernels.bench.shapes import Shape

MAX_RELATIVE_DIFFERENCE = 2**-6
"""The norm of the difference of two results, relative to the norm: four roundings to bf16 of half a unit of 2^-7 each. An
implementation that rounds every intermediate result stays below it; one that computes something else is far above."""
SEED = 5
DIRECTIONS = ("forward", "backward", "forward+backward")
Row = dict[str, Any]
"""The figures of one implementation in one direction, or a note why there are none."""
NO_FIGURES: Row = dict.fromkeys((
    *TimingStats._fields, *Work._fields, "gb_per_second", "tflops_per_second", "executed_tflops_per_second", "fraction",
    "peak_extra_bytes",
))  # fmt: skip


class NotMeasured(Exception):
    """Raised, with the reason, for an implementation that is not measured."""


def measure_shape(
    op: Operation, shape: Shape, device: torch.device, ceilings: Ceilings, name: str = "", *, deadline: float = math.inf
) -> Iterator[Row]:
    """Yield a row for each direction of each implementation with `name` in its name, or one row with the reason if it fails.

    Implementations take turns, so that none gets a cooler device. Ours always runs once, because the results of the others are
    compared with its results. Nothing starts after the deadline, a value of time.monotonic().
    """
    if time.monotonic() >= deadline:
        yield make_row(op, shape, device, "all", note="not measured: out of time")
        return
    example = seeded_example(op.make_example, shape, device)
    failures: dict[str, str] = {}
    functions = _agreeing_functions(op, shape, example, name, deadline, failures)
    num_copies = measure.num_input_sets((*example.inputs, *example.out_gradients)) - 1
    sets = [example, *(copy.deepcopy(example) for _ in range(num_copies))]
    turns = [_timed_turn(rival, function, sets, device, failures) for rival, function in functions.items()]
    for rival, times in zip(functions, measure.time_interleaved(turns, device), strict=True):
        try:
            peaks = [_peak_bytes(functions[rival], example, direction, device) for direction in times]
        except Exception as error:  # out of memory, for example
            failures[rival] = one_line_reason(error)
            continue
        for (direction, timing), peak in zip(times.items(), peaks, strict=True):
            figures = make_figures(op, shape, direction, timing, ceilings)
            yield make_row(op, shape, device, rival, direction, peak_extra_bytes=peak, **figures)
    for rival, reason in failures.items():
        if name in rival:
            yield make_row(op, shape, device, rival, note=f"not measured: {reason}")


def _agreeing_functions(
    op: Operation, shape: Shape, example: Example, name: str, deadline: float, failures: dict[str, str]
) -> dict[str, Function]:
    """Return the implementations to measure. Add each one that fails, or disagrees with the first, to `failures`."""
    functions: dict[str, Function] = {}
    reference: tuple[str, list[Tensor]] | None = None
    for rival, make_function in op.implementations.items():
        if reference is not None and name not in rival:
            continue
        try:
            if time.monotonic() >= deadline:
                raise NotMeasured("out of time")
            function = make_function(shape)
            values = run_forward_backward(function, copy.deepcopy(example))
            check_agreement(reference, values)
            reference = reference or (rival, values)
            if name in rival:
                functions[rival] = function
        # An implementation may raise anything, and its failure must not lose the figures of the other.
        except Exception as reason:
            failures[rival] = one_line_reason(reason)
    return functions


def _timed_turn(
    rival: str, function: Function, sets: list[Example], device: torch.device, failures: dict[str, str]
) -> Callable[[], PassTimes]:
    """Return a function that times both directions with each input set, and returns nothing once a call has failed.

    All sets run forward before any runs backward. The time of both directions is the sum, because a backward pass has to follow
    a forward pass anyway.
    """
    inputs = [tensor.detach().clone() for tensor in sets[0].inputs]

    def turn() -> PassTimes:
        ready: list[tuple[Any, Example]] = []
        try:
            forward_us = measure.time_calls(lambda e: ready.append((function(*e.inputs), e)), sets, device)
            backward_us = measure.time_calls(lambda pair: gradients(*pair), ready, device)
        except Exception as reason:
            failures[rival] = one_line_reason(reason)
            return {}
        finally:  # restore the inputs: the backward of our cross-entropy overwrites the logits
            for example in sets:
                for tensor, value in zip(example.inputs, inputs, strict=True):
                    tensor.detach().copy_(value)
        both_us = [sum(pair) for pair in zip(forward_us, backward_us, strict=True)]
        return dict(zip(DIRECTIONS, (forward_us, backward_us, both_us), strict=True))

    return turn


def _peak_bytes(function: Function, example: Example, direction: str, device: torch.device) -> int | None:
    if direction == "forward":
        return measure.peak_extra_bytes(lambda: function(*example.inputs), device)
    if direction == "backward":
        outputs = function(*example.inputs)
        return measure.peak_extra_bytes(lambda: gradients(outputs, example), device)
    return measure.peak_extra_bytes(lambda: gradients(function(*example.inputs), example), device)


def seeded_example(make_example: Callable[[Shape], Example], shape: Shape, device: torch.device) -> Example:
    torch.manual_seed(SEED)
    with device:
        return make_example(shape)


def run_forward_backward(function: Function, example: Example) -> list[Tensor]:
    """Return results and gradients. Inputs may be overwritten."""
    outputs = function(*example.inputs)
    results = [output.detach().clone() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    return [*results, *gradients(outputs, example)]


def gradients(outputs: Tensor | tuple[Tensor, ...], example: Example) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, example.inputs_with_grad, example.out_gradients)


def check_agreement(reference: tuple[str, list[Tensor]] | None, actual: list[Tensor]) -> None:
    """Raises: NotMeasured if a result is not finite, or differs from the reference by more than rounding."""
    if not all(tensor.isfinite().all() for tensor in actual):
        raise NotMeasured("a result is not finite")
    if reference is None:
        return
    name, expected = reference
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        raise NotMeasured(f"the shapes of its results differ from those of {name}")
    for index, (true, found) in enumerate(zip(expected, actual, strict=True)):
        difference = (torch.linalg.vector_norm(found.float() - true.float()) / true.float().norm()).item()
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            limit = f"{difference:.2g} of its norm, more than {MAX_RELATIVE_DIFFERENCE:.2g}"
            raise NotMeasured(f"result {index} differs from that of {name} by {limit}")


def make_figures(op: Operation, shape: Shape, direction: str, times: TimingStats, ceilings: Ceilings) -> Row:
    forward, backward = op.work(shape)
    both = Work(*map(sum, zip(forward, backward, strict=True)))
    work, us = {"forward": forward, "backward": backward}.get(direction, both), times.time_p50_us
    by_copy, by_matmul = work.bytes / ceilings.copy_bytes_per_second, work.flops / ceilings.matmul_flops_per_second
    rates = {"gb_per_second": work.bytes / us / 1e3, "tflops_per_second": work.flops / us / 1e6}
    rates |= {"executed_tflops_per_second": work.executed_flops / us / 1e6}
    fraction = 1e6 / us * (by_copy if op.ceiling == "copy" else by_matmul)
    return times._asdict() | work._asdict() | rates | {"fraction": fraction}


def make_row(
    op: Operation,
    shape: Shape,
    device: torch.device,
    rival: str,
    direction: str = "all",
    note: str = "",
    **figures: Any,
) -> Row:
    names = {"op": op.name, "shape": shape.name, "rival": rival, "direction": direction}
    names |= {"dtype": str(shape.dtype).removeprefix("torch."), "ceiling": op.ceiling}
    return names | NO_FIGURES | figures | {"note": note} | environment(device_name(device))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: str) -> dict[str, str]:
    """Device, versions and commit, without which a figure means nothing."""
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": git_commit()}


@cache
def git_commit() -> str:
    """Return the commit of the checkout that holds this file, with a plus if `kernels/` has uncommitted changes.

    Without git or a checkout, return the environment variable TANDEM_COMMIT, or "no checkout" if it is not set.
    """
    root = Path(__file__).resolve().parents[2]
    # Not the repository of another project whose environment contains our packages.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    git = partial(subprocess.run, cwd=root, env=environment, capture_output=True, text=True)
    try:
        head, status = git(["git", "rev-parse", "HEAD"]), git(["git", "status", "--porcelain", "kernels"])
    except OSError:
        head = None
    if head is None or head.returncode:
        return os.environ.get("TANDEM_COMMIT") or "no checkout"
    return head.stdout.strip() + ("+" if status.stdout else "")


def one_line_reason(reason: Exception) -> str:
    first = (str(reason).strip().splitlines() or [""])[0]
    return (first if isinstance(reason, NotMeasured) else f"{type(reason).__name__}: {first}")[:200]
