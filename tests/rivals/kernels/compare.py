"""Measure every rival of an operation at a shape, on the same values, after checking that it computes the same.

All rivals of a shape are prepared and checked first and then timed in turns, so that none gets a cooler device.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from tandem.kernels.bench import measure
from tandem.kernels.bench.compare import (
    DIRECTIONS,
    NotMeasured,
    Row,
    check_agreement,
    make_figures,
    make_row,
    one_line_reason,
    seeded_example,
)
from tandem.kernels.bench.measure import Ceilings, PassTimes, TimingStats
from tandem.kernels.bench.ops import Example, Function
from tandem.kernels.bench.shapes import Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival


@dataclass
class PreparedRival:
    """A rival at a shape, with what is known before it is timed."""

    shape: Any
    function: Function = lambda: ()
    input_sets: list[Example] = field(default_factory=list)
    """Copies of the same values."""
    saved_bytes: int = 0
    overwrites_inputs: bool = False
    """If true, its inputs are restored after each turn."""
    note: str = ""
    failure: str = ""
    """Why it has no figure."""


def measure_rivals(
    op: ContestedOperation,
    shape: Any,
    device: torch.device,
    ceilings: Ceilings,
    is_selected: Callable[[str], bool] = lambda name: True,
    *,
    deadline: float = math.inf,
) -> Iterator[Row]:
    """Yield one row per direction of each selected rival that runs, and one with the reason for each that does not.

    Nothing new starts after the deadline, a value of time.monotonic(). What has started is measured.
    """
    if time.monotonic() >= deadline:
        yield _row(op, shape, device, "all", note="not measured: out of time")
        return
    # Functions compiled for one shape would make torch.compile switch to dynamic shapes at the next one.
    torch._dynamo.reset()
    prepared = _prepare_rivals(op, shape, device, is_selected, deadline)
    running = {name: one for name, one in prepared.items() if not one.failure}
    stats = measure.time_interleaved([_timed_turn(one, device) for one in running.values()], device)
    times = dict(zip(running, stats, strict=True))
    for name, one in prepared.items():
        measured = []
        try:
            measured = _measure_directions(op, one, times[name], ceilings, device) if times.get(name) else []
        except Exception as reason:
            one.failure = one_line_reason(reason)
        for figures in measured:
            yield _row(op, shape, device, name, **figures, saved_bytes=one.saved_bytes, note=one.note)
        if one.failure:
            yield _row(op, shape, device, name, note=f"not measured: {one.failure}")


def _prepare_rivals(
    op: ContestedOperation, shape: Any, device: torch.device, is_selected: Callable[[str], bool], deadline: float
) -> dict[str, PreparedRival]:
    """Run each selected rival once and compare its results with those of the first one, selected or not."""
    example = seeded_example(op.make_example, shape, device)
    sets: list[Example] = []
    reference: tuple[str, list[Tensor]] | None = None
    prepared = {}
    for rival in op.rivals:
        if reference is not None and not is_selected(rival.name):
            continue
        one = PreparedRival(shape)
        try:
            if time.monotonic() >= deadline:
                raise NotMeasured("out of time")
            one.shape = rival.substitute_shape(shape)
            is_comparable = rival.make_example is None and one.shape == shape
            make_example = rival.make_example or op.make_example
            own_example = example if is_comparable else seeded_example(make_example, one.shape, device)
            one.function = rival_function(rival, one.shape, device)
            values, one.saved_bytes, one.overwrites_inputs = run_forward_backward(one.function, own_example)
            check_agreement(reference if is_comparable else None, values)
            if is_comparable:
                reference = reference or (rival.name, values)
            del values
            if is_selected(rival.name):
                sets = sets or _input_sets(example)
                one.input_sets = sets if is_comparable else _input_sets(own_example)
            notes = ["" if is_comparable else rival.deviation, "overwrites its inputs" if one.overwrites_inputs else ""]
            one.note = "; ".join(filter(None, notes))
        # A rival may raise anything, and its failure must not lose the figures of the others.
        except Exception as reason:
            one.failure = one_line_reason(reason)
        if is_selected(rival.name):
            prepared[rival.name] = one
        _free_memory()
    return prepared


def _timed_turn(one: PreparedRival, device: torch.device) -> Callable[[], PassTimes]:
    """Return a function that times both directions with each input set, and returns nothing once the rival has failed.

    All sets run forward before any runs backward. The time of both directions is the sum, because a backward pass has to follow
    a forward pass anyway.
    """
    before = [tensor.detach().clone() for tensor in one.input_sets[0].inputs] if one.overwrites_inputs else []

    def turn() -> PassTimes:
        ready: list[tuple[Example, tuple[Tensor, ...]]] = []

        def forward(example: Example) -> None:
            ready.append((example, _as_tuple(one.function(*example.inputs))))

        try:
            forward_us = measure.time_calls(forward, one.input_sets, device)
            backward_us = measure.time_calls(lambda pair: _backward_gradients(pair[1], pair[0]), ready, device)
        except Exception as reason:
            one.failure = one_line_reason(reason)
            ready.clear()
            _free_memory()
            return {}
        finally:
            for example in one.input_sets if one.overwrites_inputs else ():
                _restore_inputs(example, before)
        both_us = [sum(pair) for pair in zip(forward_us, backward_us, strict=True)]
        return {"forward": forward_us, "backward": backward_us, "forward+backward": both_us}

    return turn


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _input_sets(example: Example) -> list[Example]:
    num_copies = measure.num_input_sets((*example.inputs, *example.out_gradients)) - 1
    return [example, *(_copy_example(example) for _ in range(num_copies))]


def rival_function(rival: Rival, shape: Any, device: torch.device) -> Function:
    """Raises: NotMeasured if the rival needs a GPU and there is none."""
    if rival.needs_gpu and device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise NotMeasured("needs a GPU")
    return rival.make_function(shape)


def run_forward_backward(function: Function, example: Example) -> tuple[list[Tensor], int, bool]:
    """Return results and gradients, the bytes kept between them, and whether inputs were overwritten; restore the inputs."""
    before = [tensor.detach().clone() for tensor in example.inputs]
    storages: dict[int, int] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
            outputs = _as_tuple(function(*example.inputs))
        tensors = [output.detach().clone() for output in outputs]
        tensors += [gradient.clone() for gradient in _backward_gradients(outputs, example)]
        overwrites = not all(torch.equal(a, b) for a, b in zip(before, example.inputs, strict=True))
    finally:
        _restore_inputs(example, before)
    return tensors, sum(storages.values()), overwrites


def _measure_directions(
    op: ContestedOperation, one: PreparedRival, times: dict[str, TimingStats], ceilings: Ceilings, device: torch.device
) -> list[dict[str, Any]]:
    peaks = _peak_bytes(one, device)
    return [
        {
            "direction": direction,
            "peak_extra_bytes": peaks[direction],
            **make_figures(op, one.shape, direction, times[direction], ceilings),
        }
        for direction in DIRECTIONS
    ]


def _peak_bytes(one: PreparedRival, device: torch.device) -> dict[str, int | None]:
    example, outputs = one.input_sets[0], list[tuple[Tensor, ...]]()
    before = [tensor.detach().clone() for tensor in example.inputs] if one.overwrites_inputs else []

    def forward() -> None:
        outputs.append(_as_tuple(one.function(*example.inputs)))

    def backward() -> None:
        _backward_gradients(outputs.pop(), example)

    def both() -> None:
        forward()
        backward()

    peaks: dict[str, int | None] = {}
    for direction, call in zip(DIRECTIONS, (forward, backward, both), strict=True):
        peaks[direction] = measure.peak_extra_bytes(call, device)
        if one.overwrites_inputs and not outputs:
            _restore_inputs(example, before)
    return peaks


def _row(op: ContestedOperation, shape: Shape, device: torch.device, rival: str, **known: Any) -> Row:
    return make_row(op, shape, device, rival, **({"saved_bytes": None} | known))


def _backward_gradients(outputs: tuple[Tensor, ...], example: Example) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, example.inputs_with_grad, example.out_gradients)


def _copy_example(example: Example) -> Example:
    inputs = (tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in example.inputs)
    return Example(tuple(inputs), tuple(tensor.clone() for tensor in example.out_gradients))


@torch.no_grad()
def _restore_inputs(example: Example, before: list[Tensor]) -> None:
    for tensor, value in zip(example.inputs, before, strict=True):
        tensor.copy_(value)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
