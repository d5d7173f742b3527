"""The output projection and cross-entropy over it, one chunk of the vocabulary at a time.

    forward   logits = hidden @ weight[chunk].T, added to the maximum, total and target_logit of `cross_entropy`
    backward  logits again, replaced by their gradient g;  dweight[chunk] = g.T @ hidden;  dhidden += g @ weight[chunk]

Only the logits of one chunk are in memory. Chunks divide the vocabulary and not the tokens, so that the gradient of a weight is
one product over all tokens, rounded once; the gradient of hidden is summed in fp32 and rounded once. The cost is 8 instead of 6
operations per token and weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tandem.kernels.cross_entropy import compute_dtype, initial_statistics

MAX_CHUNKS = 16
"""A chunk is a sixteenth of the logits, rounded up to whole blocks: less than a tenth of them from 30 blocks on.

Backward also holds hidden's gradient in fp32. At both models the two together are 8 % of the logits in fp32, or 17 % in bf16.
"""
VOCAB_BLOCK_SIZE = 128
"""Columns of a matrix product's tile."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden_size"],
    weight: Float[Tensor, "vocab_local hidden_size"],
    targets: Int64[Tensor, " tokens"],
    *,
    num_valid_columns: int,
    scale: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return the three numbers of `cross_entropy` for hidden times the transposed weight.

    The rows of the weight after `num_valid_columns` are padding. Logits have the dtype of hidden and weight. Backward keeps
    hidden, weight, targets and three numbers per token.
    """
    op = torch.ops.tandem.linear_cross_entropy
    maximum, total, target_logit = op(hidden, weight, targets, num_valid_columns, scale)
    return maximum.detach(), total, target_logit


def columns_per_chunk(vocab_local: int) -> int:
    """Return the columns of every chunk except the last."""
    return VOCAB_BLOCK_SIZE * -(-vocab_local // (MAX_CHUNKS * VOCAB_BLOCK_SIZE))


def chunked_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, num_valid_columns: int, scale: float) -> Tensor:
    """Return maximum, total and target_logit, [3, tokens], with one buffer for logits."""
    statistics = initial_statistics(hidden, targets)
    for first, columns, logits, _ in _logit_chunks(hidden, weight, num_valid_columns):
        torch.ops.tandem.cross_entropy_add(logits, targets, statistics, first=first, columns=columns, scale=scale)
    return statistics


def chunked_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: Tensor, gradient: Tensor,
    num_valid_columns: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden (in fp32) and weight, given that of the statistics, with one buffer for logits."""
    per_token = statistics[0], gradient[1], gradient[2]
    hidden_gradient = torch.zeros(hidden.shape, dtype=compute_dtype(hidden.dtype), device=hidden.device)
    weight_gradient = weight.new_empty(weight.shape)
    for first, columns, logits, rows in _logit_chunks(hidden, weight, num_valid_columns):
        torch.ops.tandem.cross_entropy_gradient(logits, targets, *per_token, first=first, columns=columns, scale=scale)
        torch.mm(logits.t(), hidden, out=weight_gradient[first : first + len(rows)])
        _accumulate_matmul(hidden_gradient, logits, rows)
    return hidden_gradient, weight_gradient


def _logit_chunks(hidden: Tensor, weight: Tensor, num_valid_columns: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield first id, columns without padding, logits (overwritten by the next chunk), rows of the weight."""
    buffer = hidden.new_empty(len(hidden), min(columns_per_chunk(len(weight)), len(weight)))
    for first in range(0, len(weight), buffer.shape[1]):
        rows = weight[first : first + buffer.shape[1]]
        logits = torch.mm(hidden, rows.t(), out=buffer[:, : len(rows)])
        yield first, min(max(num_valid_columns - first, 0), len(rows)), logits, rows


def _accumulate_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.device.type == "cpu":  # torch 2.13 has no CPU product with a result wider than its factors
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@torch.library.custom_op("tandem::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int, scale: float) -> Tensor:
    return chunked_statistics(hidden, weight, targets, columns, scale)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int, scale: float) -> Tensor:
    return initial_statistics(hidden, targets)


@torch.library.custom_op("tandem::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: Tensor, gradient: Tensor, columns: int, scale: float
) -> tuple[Tensor, Tensor]:
    hidden_gradient, weight_gradient = chunked_gradients(hidden, weight, targets, statistics, gradient, columns, scale)
    # Convert here, after the buffer for logits is freed: both at once would raise the peak.
    return hidden_gradient.to(hidden.dtype), weight_gradient


@_linear_cross_entropy_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: Tensor, gradient: Tensor, columns: int, scale: float
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, ctx.columns, ctx.scale = inputs
    ctx.save_for_backward(hidden, weight, targets, output)


def _autograd_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    gradients = torch.ops.tandem.linear_cross_entropy_backward(*ctx.saved_tensors, gradient, ctx.columns, ctx.scale)
    return (*gradients, None, None, None)


_linear_cross_entropy.register_autograd(_autograd_backward, setup_context=_setup_context)
