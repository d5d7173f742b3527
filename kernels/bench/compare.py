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

from tandem.kernels.bench.measure import Ceilings, Pass, Times, interleaved, num_sets, peak_extra_bytes, timed
from tandem.kernels.bench.operation import DIRECTIONS, Direction, Example, Function, Operation, Refused, Rival

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


@dataclass
class Contestant:
    """A rival at a shape: what it is timed with, and what is known of it without a clock."""

    shape: Any
    function: Function
    sets: list[Example]
    """The same values, in memory of their own."""
    kept_bytes: int
    overwrites: bool
    """Its inputs, which then are written anew after each turn."""
    note: str
    failure: str = ""
    """Why there is no figure of it."""


def rows(
    op: Operation,
    shape: Any,
    device: torch.device,
    ceilings: Ceilings,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    deadline: float = math.inf,
) -> Iterator[Row]:
    """One for each direction of each wanted rival that runs, and one with the reason for each that does not.

    Nothing new is begun after the deadline, a moment of time.monotonic(); what has begun is measured.
    """
    if time.monotonic() >= deadline:
        yield _row(op, shape, "all", device, direction="all", note="not measured: left out, time was over")
        return
    # What was compiled for another shape would make the next one compile for all shapes at once.
    torch._dynamo.reset()
    contestants = _contestants(op, shape, device, wanted, deadline)
    running = {rival: one for rival, one in contestants.items() if not one.failure}
    found = interleaved([_turn(one, device) for one in running.values()], device)
    times = dict(zip(running, found, strict=True))
    for rival, one in contestants.items():
        measured = []
        try:
            measured = [*_measured(op, one, times[rival], ceilings, device)] if times.get(rival) else []
        except Exception as reason:
            one.failure = said(reason)
        for of_direction in measured:
            yield _row(op, shape, rival, device, **of_direction, kept_bytes=one.kept_bytes, note=one.note)
        if one.failure:
            yield _row(op, shape, rival, device, direction="all", note=f"not measured: {one.failure}")


def _contestants(
    op: Operation, shape: Any, device: torch.device, wanted: Callable[[str], bool], deadline: float
) -> dict[str, Contestant]:
    """Of each wanted rival, with the reason where it cannot be one."""
    example = example_of(op.example, shape, device)
    sets: list[Example] = []
    reference: tuple[str, list[Tensor]] | None = None
    found = {}
    for rival in op.rivals:
        if reference is not None and not wanted(rival.name):
            continue
        one = Contestant(shape, lambda: (), [], 0, False, "")
        try:
            if time.monotonic() >= deadline:
                raise Refused("left out, time was over")
            one.shape = rival.instead(shape)
            comparable = rival.example is None and one.shape == shape
            own = example if comparable else example_of(rival.example or op.example, one.shape, device)
            one.function = function_of(rival, one.shape, device)
            values, one.kept_bytes, one.overwrites = results(one.function, own)
            agree(reference if comparable else None, values)
            if comparable:
                reference = reference or (rival.name, values)
            del values
            if wanted(rival.name):
                sets = sets or _sets(example)
                one.sets = sets if comparable else _sets(own)
            notes = ["" if comparable else rival.other, "overwrites its inputs" if one.overwrites else ""]
            one.note = "; ".join(filter(None, notes))
        # Of any kind: rivals are not ours, and nobody's figures may be lost with one of them.
        except Exception as reason:
            one.failure = said(reason)
        if wanted(rival.name):
            found[rival.name] = one
        _tidy()
    return found


def _turn(one: Contestant, device: torch.device) -> Callable[[], Pass]:
    """Times both directions with each set; nothing once it has failed. All go forward before any goes back.

    Both directions together are the sum for each set: a backward has to follow a forward anyway.
    """
    before = [tensor.detach().clone() for tensor in one.sets[0].inputs] if one.overwrites else []

    def turn() -> Pass:
        ready: list[tuple[Example, tuple[Tensor, ...]]] = []
        try:
            forward = timed(
                lambda values: ready.append((values, _tuple(one.function(*values.inputs)))), one.sets, device
            )
            backward = timed(lambda pair: _gradients(pair[1], pair[0]), ready, device)
        except Exception as reason:
            one.failure = said(reason)
            ready.clear()
            _tidy()
            return {}
        finally:
            for values in one.sets if one.overwrites else ():
                _restore(values, before)
        both = [sum(pair) for pair in zip(forward, backward, strict=True)]
        return {"forward": forward, "backward": backward, "forward+backward": both}

    return turn


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _sets(example: Example) -> list[Example]:
    return [example] + [_copy(example) for _ in range(1, num_sets((*example.inputs, *example.out_gradients)))]


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
    op: Operation, one: Contestant, times: dict[str, Times], ceilings: Ceilings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What is measured of each direction."""
    values = one.sets[0]
    before = [tensor.detach().clone() for tensor in values.inputs] if one.overwrites else []

    def forward() -> tuple[Tensor, ...]:
        return _tuple(one.function(*values.inputs))

    for direction in DIRECTIONS:
        ready = forward() if direction == "backward" else ()
        calls: dict[Direction, Callable[[], object]] = {
            "forward": forward,
            "backward": lambda: _gradients(ready, values),  # noqa: B023, called in this turn of the loop
            "forward+backward": lambda: _gradients(forward(), values),
        }
        peak = peak_extra_bytes(calls[direction], device)
        if one.overwrites:
            _restore(values, before)
        spent = times[direction]
        yield {
            "direction": direction,
            "time_us_20": spent.percentile_20,
            "time_us_50": spent.percentile_50,
            "time_us_80": spent.percentile_80,
            "repetitions": spent.repetitions,
            "peak_extra_bytes": peak,
            **_rates(op, one.shape, direction, spent.percentile_50, ceilings),
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
    root = Path(__file__).resolve().parents[2]
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


def said(reason: Exception) -> str:
    """In one line."""
    first = (str(reason).strip().splitlines() or [""])[0]
    return (first if isinstance(reason, Refused) else f"{type(reason).__name__}: {first}")[:200]
