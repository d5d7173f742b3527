"""The error of our results and gradients against fp64, next to the error of plain torch in the same dtype."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.kernels.bench.compare import device_name, environment, seeded_example
from tandem.kernels.bench.ops import OPERATIONS, Example, Function, Operation, document_ids, scaled_logits, slopes_of
from tandem.kernels.bench.shapes import Shape
from tandem.kernels.device.shared import upcast
from tests.rivals.kernels.operation import MakeExample

MAX_ERROR_RATIO = 1.1
"""Our error may be this many times plain torch's."""


@dataclass(frozen=True)
class Precision:
    """The functions whose errors are compared. The exact result is the plain function's in fp64, on the same values."""

    result_names: tuple[str, ...]
    """Of the results, then of the inputs that get a gradient."""
    make_ours: Callable[[Any], Function]
    make_plain: Callable[[Any], Function]
    """What one would write with torch's own operations: products in the inputs' dtype; sums and exponentials in fp32 or wider
    if torch leaves the choice."""
    make_example: MakeExample | None = None
    """Its own inputs, if the operation's give a mean and so only one number to judge by."""


@dataclass(frozen=True)
class ErrorMeasurement:
    op: str
    shape: str
    tokens: int
    dtype: str
    result: str
    """A name; "d x" is the gradient of x."""
    ours: float
    """The norm of the difference from the exact result, relative to the norm of the exact result."""
    plain: float
    device: str
    torch: str
    triton: str
    commit: str

    @property
    def ratio(self) -> float:
        """Our error divided by plain torch's; 1 if both are exact."""
        if self.plain > 0:
            return self.ours / self.plain
        return 1.0 if self.ours == 0 else float("inf")

    @property
    def is_within_limit(self) -> bool:
        return self.ratio <= MAX_ERROR_RATIO


def measure_errors(op: Operation, shape: Any, device: torch.device) -> Iterator[ErrorMeasurement]:
    """Yield one row for each of our results and gradients, on the values that rivals are compared with."""
    precision = PRECISIONS[op.name]
    example = seeded_example(precision.make_example or op.make_example, shape, device)
    plain = precision.make_plain(shape)
    exact = _run_in_dtype(plain, example, torch.float64)
    found = [_run_in_dtype(function, example, shape.dtype) for function in (precision.make_ours(shape), plain)]
    dtype, facts = str(shape.dtype).removeprefix("torch."), environment(device_name(device))
    for name, true, *both in zip(precision.result_names[: len(exact)], exact, *found, strict=True):
        ours, plain_error = (_relative_error(values, true) for values in both)
        yield ErrorMeasurement(op.name, shape.name, shape.tokens, dtype, name, ours, plain_error, **facts)


def _run_in_dtype(function: Function, example: Example, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients on copies of the values in that dtype. Values that are wider already keep theirs."""

    def copy(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, dtype) if x.is_floating_point() else x.dtype
        return x.detach().to(wide, copy=True).requires_grad_(x.requires_grad)

    values = Example(tuple(map(copy, example.inputs)), tuple(map(copy, example.out_gradients)))
    outputs = function(*values.inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    gradients = torch.autograd.grad(outputs, values.inputs_with_grad, values.out_gradients)
    return [*(x.detach() for x in outputs), *gradients]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    difference = found.to(torch.float64, copy=True).sub_(exact)
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(exact))


def _eager_attention(shape: Shape) -> Function:
    """Attention with its scores written out, one key head at a time: products in the inputs' dtype, biases and softmax in fp32.

    SDPA takes biases in the inputs' dtype, and bf16 rounds those of distant keys by more than it rounds their weights.
    """

    @functools.cache
    def mask_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        place = torch.arange(shape.tokens, device=device)
        distance, ids = place[:, None] - place, document_ids(shape, device)
        unseen = (distance < 0)[None, None]
        if ids is not None:
            unseen = unseen | (ids[:, None, :, None] != ids[:, None, None, :])
        return distance, unseen, slopes_of(shape, device)

    def attend_kv_head(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, distance: Tensor, unseen: Tensor
    ) -> Tensor:
        scores = shape.attention_scale * upcast(q @ k.mT)
        if slopes is not None:
            scores = scores - slopes.to(scores.dtype)[:, None, None] * distance
        return scores.masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype) @ v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance, unseen, slopes = mask_inputs(q.device)
        group = shape.num_heads // shape.num_kv_heads
        parts = (x.transpose(1, 2).split(size, 1) for x, size in ((q, group), (k, 1), (v, 1)))
        of_heads = [None] * shape.num_kv_heads if slopes is None else slopes.split(group)
        heads = [
            checkpoint(attend_kv_head, *part, distance, unseen, use_reentrant=False)
            for part in zip(*parts, of_heads, strict=True)
        ]
        return torch.cat(heads, 1).transpose(1, 2)

    return attend


def _per_token(make: MakeExample) -> MakeExample:
    """The same example with a loss for each token, whose gradient is what the mean's would be."""

    return lambda shape: Example(make(shape).inputs, (torch.full((shape.tokens,), 1 / shape.tokens),))


def _per_token_precision(name: str, *result_names: str) -> Precision:
    def plain(shape: Shape) -> Function:
        def losses(*inputs: Tensor) -> Tensor:
            *factors, targets = inputs
            logits = factors[0] @ factors[1].t() if len(factors) == 2 else factors[0]
            return F.cross_entropy(scaled_logits(shape, upcast(logits)), targets, reduction="none")

        return losses

    op = OPERATIONS[name]
    return Precision(result_names, op.our_losses, plain, _per_token(op.make_example))


def _precision(name: str, *result_names: str) -> Precision:
    return Precision(result_names, OPERATIONS[name].ours, OPERATIONS[name].plain)


PRECISIONS = {
    "attention": Precision(("out", "d query", "d key", "d value"), OPERATIONS["attention"].ours, _eager_attention),
    "linear_cross_entropy": _per_token_precision("linear_cross_entropy", "losses", "d hidden", "d weight"),
    "swiglu": _precision("swiglu", "out", "d gate_up"),
    "swiglu_linear": _precision("swiglu_linear", "out", "d gate_up", "d weight"),
    "qkv": _precision("qkv", "query", "key", "value", "d qkv", "d query_norm", "d key_norm"),
    "cross_entropy": _per_token_precision("cross_entropy", "losses", "d logits"),
}
"""By operation."""
