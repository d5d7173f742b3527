"""Rows: every rival of an operation at a shape, on the same values, checked to compute the same before it is timed."""

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.bench.measure import Ceilings, num_sets, peak_extra_bytes, times
from kernels.bench.operation import DIRECTIONS, Direction, Example, Function, Operation, Refused, Rival

DISAGREEMENT = 2**-6
"""Of two results, the norm of the difference relative to the norm: four roundings to bf16, half a unit of 2^-7 each. Whoever
rounds every intermediate result stays below it, what computes something else is far above."""
SEED = 5


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    rival: str
    direction: str
    dtype: str
    time_us_20: float | None
    time_us_50: float | None
    time_us_80: float | None
    repetitions: int | None
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
    kept_bytes: int | None
    """Storages that forward leaves for backward, inputs among them."""
    note: str
    """Why nothing was measured, or what to know about the figure."""
    card: str
    torch: str
    triton: str
    commit: str


def rows(
    op: Operation,
    shape: Any,
    device: torch.device,
    ceilings: Ceilings,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[Row]:
    """One for each direction of each wanted rival that runs, and one with the reason for each that does not."""
    example = example_of(op.example, shape, device)
    reference: tuple[str, list[Tensor]] | None = None
    for rival in op.rivals:
        if reference is not None and not wanted(rival.name):
            continue
        try:
            own_shape = rival.instead(shape)
            comparable = rival.example is None and own_shape == shape
            own = example if comparable else example_of(rival.example or op.example, own_shape, device)
            function = function_of(rival, own_shape, device)
            found, kept_bytes, overwrites = results(function, own)
            agree(reference if comparable else None, found)
            if comparable:
                reference = reference or (rival.name, found)
            del found
            if wanted(rival.name):
                notes = [rival.other if not comparable else "", "overwrites its inputs" if overwrites else ""]
                for measured in _measured(op, own_shape, function, own, overwrites, ceilings):
                    known = {"kept_bytes": kept_bytes, "note": "; ".join(filter(None, notes))}
                    yield _row(op, shape, rival.name, device, **measured, **known)
        # Of any kind: rivals are not ours, and nobody's figures may be lost with one of them.
        except Exception as reason:
            yield _row(op, shape, rival.name, device, direction="all", note=f"not measured: {_said(reason)}")
        gc.collect()
        torch.cuda.empty_cache()


def example_of(make: Callable[..., Example], shape: Any, device: torch.device) -> Example:
    return make(shape, device, shape.dtype, torch.Generator(device).manual_seed(SEED))


def function_of(rival: Rival, shape: Any, device: torch.device) -> Function:
    if rival.gpu and device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise Refused("needs a GPU")
    return rival.function(shape)


def results(function: Function, example: Example) -> tuple[list[Tensor], int, bool]:
    """Results and gradients, bytes kept between them, whether inputs were overwritten; they are as before afterwards."""
    before = [tensor.detach().clone() for tensor in example.inputs]
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = _tuple(function(*example.inputs))
        found = [output.detach().clone() for output in outputs]
        found += [gradient.clone() for gradient in _gradients(outputs, example)]
        overwrites = not all(torch.equal(a, b) for a, b in zip(before, example.inputs, strict=True))
    finally:
        _restore(example, before)
    return found, sum(storages.values()), overwrites


def agree(reference: tuple[str, list[Tensor]] | None, found: list[Tensor]) -> None:
    """Raises: Refused where a result is not finite, or differs from the first rival's by more than rounding."""
    if not all(tensor.isfinite().all() for tensor in found):
        raise Refused("a result is not finite")
    if reference is None:
        return
    name, expected = reference
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise Refused(f"its results have other shapes than those of {name}")
    for index, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
        difference = (torch.linalg.vector_norm(theirs.float() - mine.float()) / mine.float().norm()).item()
        if not difference <= DISAGREEMENT:
            raise Refused(
                f"result {index} differs from that of {name} by {difference:.2g} of its norm, more than {DISAGREEMENT:.2g}"
            )


def _measured(
    op: Operation, shape: Any, function: Function, example: Example, overwrites: bool, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """What is measured of each direction."""
    device = example.inputs[0].device
    sets = [example] + [_copy(example) for _ in range(1, num_sets((*example.inputs, *example.out_gradients)))]
    before = [tensor.detach().clone() for tensor in example.inputs] if overwrites else []

    def forward(values: Example) -> tuple[Example, tuple[Tensor, ...]]:
        return values, _tuple(function(*values.inputs))

    def backward(ready: tuple[Example, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return _gradients(ready[1], ready[0])

    def restore() -> None:
        for values in sets if overwrites else ():
            _restore(values, before)

    try:
        for direction in DIRECTIONS:
            prepare = (lambda: [forward(values) for values in sets]) if direction == "backward" else lambda: sets
            calls: dict[Direction, Callable[[Any], object]]
            calls = {
                "forward": forward,
                "backward": backward,
                "forward+backward": lambda values: backward(forward(values)),
            }
            spent = times(prepare, calls[direction], device, restore)
            ready = prepare()
            peak = peak_extra_bytes(lambda: calls[direction](ready[0]), device)  # noqa: B023, F821
            del ready
            restore()
            yield {
                "direction": direction,
                "time_us_20": spent.percentile_20,
                "time_us_50": spent.percentile_50,
                "time_us_80": spent.percentile_80,
                "repetitions": spent.repetitions,
                "peak_extra_bytes": peak,
                **_rates(op, shape, direction, spent.percentile_50, ceilings),
            }
    finally:
        restore()


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


def _row(op: Operation, shape: Any, rival: str, device: torch.device, **known: Any) -> Row:
    fields: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__) | known | surroundings(card(device))
    fields |= {"op": op.name, "shape": shape.name, "rival": rival, "ceiling": op.ceiling}
    return Row(**(fields | {"dtype": str(shape.dtype).removeprefix("torch.")}))


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def surroundings(card: str) -> dict[str, str]:
    """What a figure means nothing without."""
    return {"card": card, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}


@cache
def commit() -> str:
    """Of the checkout these files are in, with a plus where files of it have changed since.

    Where git is absent, or these files are in no checkout, the variable TANDEM_COMMIT as it is; without it "no checkout".
    """
    root = Path(__file__).parents[2]
    try:
        told = [
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "kernels"))
        ]
    except OSError:
        told = []
    if not told or told[0].returncode:
        return os.environ.get("TANDEM_COMMIT") or "no checkout"
    return told[0].stdout.strip() + ("+" if told[1].stdout else "")


def _gradients(outputs: tuple[Tensor, ...], example: Example) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, example.differentiated, example.out_gradients)


def _copy(example: Example) -> Example:
    return Example(
        tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in example.inputs),
        tuple(tensor.clone() for tensor in example.out_gradients),
    )


@torch.no_grad()
def _restore(example: Example, before: list[Tensor]) -> None:
    for tensor, value in zip(example.inputs, before, strict=True):
        tensor.copy_(value)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _said(reason: Exception) -> str:
    """In one line."""
    first = (str(reason).strip().splitlines() or [""])[0]
    return (first if isinstance(reason, Refused) else f"{type(reason).__name__}: {first}")[:200]
