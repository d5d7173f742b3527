"""Mean cross-entropy over a vocabulary, from logits and from the hidden state that gives them.

Only ours takes padded columns and a scale. Other implementations get the columns without padding, scaled in a separate step, as
a caller of theirs would have to do it here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Function, Operation, RandomTensors, Rival, Work, upcast
from tandem.kernels.bench.shapes import SMALL_MODELS, LogitsShape, logits_shapes
from tandem.kernels.cross_entropy import cross_entropy
from tandem.kernels.linear_cross_entropy import linear_cross_entropy

BYTES_PER_TOKEN = 8 + 4
"""A target, and an fp32 number between forward and backward."""


def make_example(shape: LogitsShape, random: RandomTensors) -> Example:
    inputs = random.leaf(shape.tokens, shape.padded_vocab_size), random.integers(shape.vocab_size, shape.tokens)
    return Example(inputs, (torch.ones((), device=random.device),))


def make_linear_example(shape: LogitsShape, random: RandomTensors) -> Example:
    hidden = random.leaf(shape.tokens, shape.hidden_size)
    weight = random.leaf(shape.padded_vocab_size, shape.hidden_size, scale=shape.hidden_size**-0.5)
    targets = random.integers(shape.vocab_size, shape.tokens)
    return Example((hidden, weight, targets), (torch.ones((), device=random.device),))


def _forward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Reads the logits without padding."""
    return Work(shape.tokens * (shape.vocab_size * element_bytes + BYTES_PER_TOKEN))


def _backward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Reads the logits without padding again, writes the gradient of all."""
    return Work(shape.tokens * ((shape.vocab_size + shape.padded_vocab_size) * element_bytes + BYTES_PER_TOKEN))


def _linear_forward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Reads hidden and weight: one product."""
    moved = (shape.tokens + shape.vocab_size) * shape.hidden_size * element_bytes + shape.tokens * BYTES_PER_TOKEN
    product = 2 * shape.tokens * shape.hidden_size
    return Work(moved, product * shape.vocab_size, product * shape.padded_vocab_size)


def _linear_backward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Reads hidden and weight, writes their gradients: two products, three if the logits are computed again."""
    rows = 2 * shape.tokens + shape.vocab_size + shape.padded_vocab_size
    moved = rows * shape.hidden_size * element_bytes + shape.tokens * BYTES_PER_TOKEN
    product = 2 * shape.tokens * shape.hidden_size
    return Work(moved, 2 * product * shape.vocab_size, 3 * product * shape.padded_vocab_size)


def our_losses(shape: LogitsShape) -> Function:
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        view = logits.view_as(logits)  # the operation refuses a leaf
        parts = cross_entropy(view, targets, num_valid_columns=shape.vocab_size, scale=shape.logit_scale)
        maximum, total, target_logit = parts
        return maximum - target_logit + total.log()

    return losses


def our_linear_losses(shape: LogitsShape) -> Function:
    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        sizes: dict[str, Any] = {"num_valid_columns": shape.vocab_size, "scale": shape.logit_scale}
        maximum, total, target_logit = linear_cross_entropy(hidden, weight, targets, **sizes)
        return maximum - target_logit + total.log()

    return losses


def _mean_of(make_losses: Callable[[LogitsShape], Function]) -> Callable[[LogitsShape], Function]:
    def make_function(shape: LogitsShape) -> Function:
        losses: Callable[..., Any] = make_losses(shape)
        return lambda *inputs: losses(*inputs).mean()

    return make_function


def scaled_logits(shape: LogitsShape, logits: Tensor) -> Tensor:
    columns = logits if shape.vocab_size == shape.padded_vocab_size else logits[:, : shape.vocab_size]
    return columns if shape.logit_scale == 1.0 else columns * shape.logit_scale


def torch_loss(shape: LogitsShape, reduction: str = "mean") -> Function:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scaled_logits(shape, upcast(logits)), targets, reduction=reduction)

    return loss


def torch_linear_loss(shape: LogitsShape, reduction: str = "mean") -> Function:
    loss = torch_loss(shape, reduction)
    return lambda hidden, weight, targets: loss(hidden @ weight.t(), targets)


CROSS_ENTROPY = Operation(
    "cross_entropy", "copy", make_example, _forward_work, _backward_work,
    rivals=[Rival("ours", _mean_of(our_losses), needs_gpu=False), Rival("torch", torch_loss, needs_gpu=False)],
    shapes=logits_shapes(tp_sizes=(1,)),
    extra_shapes=logits_shapes(tp_sizes=(2, 4)) + logits_shapes(SMALL_MODELS),
)  # fmt: skip
LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy", "matmul", make_linear_example, _linear_forward_work, _linear_backward_work,
    rivals=[
        Rival("ours", _mean_of(our_linear_losses), needs_gpu=False),
        Rival("torch", torch_linear_loss, needs_gpu=False),
    ],
    shapes=CROSS_ENTROPY.shapes,
    extra_shapes=CROSS_ENTROPY.extra_shapes,
)  # fmt: skip
