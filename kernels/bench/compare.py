"""Measure every rival of an operation at a shape, on the same values, after checking that it computes the same.

All rivals of a shape are prepared and checked first and then timed in turns, so that none gets a cooler device.
"""

import gc
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tandem.kernels.bench import measure
from tandem.kernels.bench.measure import Ceilings, PassTimes, TimingStats
from tandem.kernels.bench.operation import (
    DIRECTIONS,
    Direction,
    Example,
    Function,
    MakeExample,
    Operation,
    RandomTensors,
    Rival,
    SkipRival,
)

MAX_RELATIVE_DIFFERENCE = 2**-6
"""The norm of the difference of two results, relative to the norm: four roundings to bf16 of half a unit of 2^-7 each. A rival
that rounds every intermediate result stays below it; one that computes something else is far above."""
SEED = 5


@dataclass(frozen=True)
class Measurement:
    """A row. Without its device, versions and commit a figure means nothing."""

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
    """copy or matmul: what `fraction` is a fraction of. That of matmul counts `flops`, not `executed_flops`."""
    fraction: float | None
    peak_extra_bytes: int | None
    saved_bytes: int | None
    """Bytes of the storages that forward keeps for backward, including inputs."""
    note: str
    """Why nothing was measured, or a caveat about the figure."""
    device: str
    torch: str
    triton: str
    commit: str


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
    op: Operation,
    shape: Any,
    device: torch.device,
    ceilings: Ceilings,
    is_selected: Callable[[str], bool] = lambda name: True,
    *,
    deadline: float = math.inf,
) -> Iterator[Measurement]:
    """Yield one row per direction of each selected rival that runs, and one with the reason for each that does not.

    Nothing new starts after the deadline, a value of time.monotonic(). What has started is measured.
    """
    if time.monotonic() >= deadline:
        yield _measurement(op, shape, "all", device, direction="all", note="not measured: out of time")
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
            yield _measurement(op, shape, name, device, **figures, saved_bytes=one.saved_bytes, note=one.note)
        if one.failure:
            yield _measurement(op, shape, name, device, direction="all", note=f"not measured: {one.failure}")


def _prepare_rivals(
    op: Operation, shape: Any, device: torch.device, is_selected: Callable[[str], bool], deadline: float
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
                raise SkipRival("out of time")
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


def seeded_example(make: MakeExample, shape: Any, device: torch.device) -> Example:
    return make(shape, RandomTensors(device, shape.dtype, torch.Generator(device).manual_seed(SEED)))


def rival_function(rival: Rival, shape: Any, device: torch.device) -> Function:
    """Raises: SkipRival if the rival needs a GPU and there is none."""
    if rival.needs_gpu and device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise SkipRival("needs a GPU")
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


def check_agreement(reference: tuple[str, list[Tensor]] | None, actual: list[Tensor]) -> None:
    """Raises: SkipRival if a result is not finite, or differs from the reference by more than rounding."""
    if not all(tensor.isfinite().all() for tensor in actual):
        raise SkipRival("a result is not finite")
    if reference is None:
        return
    name, expected = reference
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        raise SkipRival(f"the shapes of its results differ from those of {name}")
    for index, (true, found) in enumerate(zip(expected, actual, strict=True)):
        difference = (torch.linalg.vector_norm(found.float() - true.float()) / true.float().norm()).item()
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            limit = f"{MAX_RELATIVE_DIFFERENCE:.2g}"
            raise SkipRival(
                f"result {index} differs from that of {name} by {difference:.2g} of its norm, more than {limit}"
            )


def _measure_directions(
    op: Operation, one: PreparedRival, times: dict[str, TimingStats], ceilings: Ceilings, device: torch.device
) -> list[dict[str, Any]]:
    peaks = _peak_bytes(one, device)
    return [
        {
            "direction": direction,
            "time_p20_us": times[direction].p20_us,
            "time_p50_us": times[direction].p50_us,
            "time_p80_us": times[direction].p80_us,
            "num_repetitions": times[direction].num_repetitions,
            "peak_extra_bytes": peaks[direction],
            **_rates(op, one.shape, direction, times[direction].p50_us, ceilings),
        }
        for direction in DIRECTIONS
    ]


def _peak_bytes(one: PreparedRival, device: torch.device) -> dict[Direction, int | None]:
    example, outputs = one.input_sets[0], list[tuple[Tensor, ...]]()
    before = [tensor.detach().clone() for tensor in example.inputs] if one.overwrites_inputs else []

    def forward() -> None:
        outputs.append(_as_tuple(one.function(*example.inputs)))

    def backward() -> None:
        _backward_gradients(outputs.pop(), example)

    def both() -> None:
        forward()
        backward()

    peaks: dict[Direction, int | None] = {}
    for direction, call in zip(DIRECTIONS, (forward, backward, both), strict=True):
        peaks[direction] = measure.peak_extra_bytes(call, device)
        if one.overwrites_inputs and not outputs:
            _restore_inputs(example, before)
    return peaks


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
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": git_commit()}


@cache
def git_commit() -> str:
    """Return the commit of the checkout that holds this file, with a plus if `kernels/` has uncommitted changes.

    Without git or a checkout, return the environment variable TANDEM_COMMIT, or "no checkout" if it is not set.
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
    inputs = (tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in example.inputs)
    return Example(tuple(inputs), tuple(tensor.clone() for tensor in example.out_gradients))


@torch.no_grad()
def _restore_inputs(example: Example, before: list[Tensor]) -> None:
    for tensor, value in zip(example.inputs, before, strict=True):
        tensor.copy_(value)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def one_line_reason(reason: Exception) -> str:
    first = (str(reason).strip().splitlines() or [""])[0]
    return (first if isinstance(reason, SkipRival) else f"{type(reason).__name__}: {first}")[:200]
