"""Errors: how far results and gradients of ours are from exact ones, beside plain torch in the same dtype."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.kernels.bench.compare import device_name, environment, seeded_example
from tandem.kernels.bench.operation import Example, Function, Operation

MAX_ERROR_RATIO = 1.1
"""How many times the error of plain torch ours may have."""


@dataclass(frozen=True)
class ErrorMeasurement:
    op: str
    shape: str
    tokens: int
    dtype: str
    result: str
    """Its name; with a d before it, that of the input whose gradient it is."""
    ours: float
    """Norm of the difference from exact, relative to the norm of exact."""
    plain: float
    device: str
    torch: str
    triton: str
    commit: str

    @property
    def ratio(self) -> float:
        """Of ours to plain; 1 if both are exact."""
        if self.plain > 0:
            return self.ours / self.plain
        return 1.0 if self.ours == 0 else float("inf")

    @property
    def is_within_limit(self) -> bool:
        return self.ratio <= MAX_ERROR_RATIO


def measure_errors(op: Operation, shape: Any, device: torch.device) -> Iterator[ErrorMeasurement]:
    """Of each result and gradient of ours, on the values that rivals are compared with."""
    assert op.precision is not None
    example = seeded_example(op.precision.make_example or op.make_example, shape, device)
    plain = op.precision.make_plain(shape)
    exact = _run_in_dtype(plain, example, torch.float64)
    found = [_run_in_dtype(function, example, shape.dtype) for function in (op.precision.make_ours(shape), plain)]
    dtype = str(shape.dtype).removeprefix("torch.")
    for name, true, *both in zip(op.precision.result_names[: len(exact)], exact, *found, strict=True):
        ours, plain_error = (_relative_error(values, true) for values in both)
        yield ErrorMeasurement(
            op.name, shape.name, shape.tokens, dtype, name, ours, plain_error, **environment(device_name(device))
        )


def _run_in_dtype(function: Function, example: Example, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients on copies of the values in that dtype, as some are overwritten. Wider ones stay as they are."""

    def copy(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, dtype) if x.is_floating_point() else x.dtype
        return x.detach().to(wide, copy=True).requires_grad_(x.requires_grad)

    values = Example(tuple(map(copy, example.inputs)), tuple(map(copy, example.out_gradients)))
    outputs = function(*values.inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad(outputs, values.inputs_with_grad, values.out_gradients),
    ]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(found.to(torch.float64, copy=True).sub_(exact)) / torch.linalg.vector_norm(exact)
    )
