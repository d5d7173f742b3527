"""Cross-entropy over given logits, as the three numbers per token that make up the loss.

    forward   maximum = max of z,  total = sum of exp(z - maximum),  target_logit = z[target],   z = scale * logit
    backward  dlogit = scale * (dtotal * exp(z - maximum) + dtarget_logit * (column == target))
    loss      maximum + log(total) - target_logit; the loss does not depend on the maximum, which is a constant to autograd

There are two reasons to return three numbers. A block of logits may be only a part of the vocabulary: the caller combines
parts on other ranks, and the two block operations below combine parts that come one after another (`linear_cross_entropy`). And
maximum + log(total) is rounded at the precision of a large number: its exponential would carry that error into all columns of
the gradient alike, where a sum over them does not cancel it. Each direction reads the logits once, and backward replaces them
by their gradient, so there is never a second tensor of their size.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tandem.kernels.device.shared import LOWEST


def cross_entropy(
    logits: Float[Tensor, "tokens vocab_local"],
    targets: Int64[Tensor, " tokens"],
    *,
    num_valid_columns: int,
    scale: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return maximum, total and target_logit over the first `num_valid_columns`, in fp32 (fp64 for fp64); the rest is padding.

    If a target is outside these columns, it is in another part of the vocabulary and its target_logit is 0. Without columns the
    maximum is LOWEST and the total 0.

    Note: backward writes the gradient over the logits. Any other use of them in backward, also a second backward, raises
    RuntimeError. No other operation here writes to a kept tensor.
    Raises: ValueError if the columns of a row are not contiguous, if rows overlap in memory, or if the logits are a leaf that
    requires a gradient.
    """
    if torch.is_grad_enabled() and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "logits are a leaf that requires a gradient, which backward would overwrite: pass a computed tensor"
        )
    tokens, width = logits.shape
    if (width > 1 and logits.stride(1) != 1) or (tokens > 1 and logits.stride(0) < width):
        raise ValueError(f"logits of shape {tokens} x {width} have strides {logits.stride()}: make them contiguous")
    maximum, total, target_logit = torch.ops.tandem.cross_entropy(logits, targets, num_valid_columns, scale)
    return maximum.detach(), total, target_logit


def initial_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """Return maximum, total and target_logit before the first block, [3, tokens]."""
    statistics = torch.zeros((3, len(targets)), dtype=compute_dtype(logits.dtype), device=logits.device)
    statistics[0].fill_(LOWEST)
    return statistics


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("tandem::cross_entropy_add", mutates_args=("statistics",), device_types="cpu")
def _add_block(logits: Tensor, targets: Tensor, statistics: Tensor, *, first: int, columns: int, scale: float) -> None:
    """Add a block to the statistics. Its first column has the id `first`; `columns` of its columns are not padding."""
    if columns == 0:
        return
    maximum, total, target_logit = statistics
    z = logits[:, :columns].to(statistics.dtype) * scale
    largest = torch.maximum(maximum, z.amax(1))
    total.mul_((maximum - largest).exp()).add_((z - largest[:, None]).exp().sum(1))
    maximum.copy_(largest)
    column = targets - first
    is_in_block = (column >= 0) & (column < columns)
    target_logit.copy_(torch.where(is_in_block, z.gather(1, column.clamp(0, columns - 1)[:, None])[:, 0], target_logit))


@_add_block.register_kernel("cuda")
def _(logits: Tensor, targets: Tensor, statistics: Tensor, *, first: int, columns: int, scale: float) -> None:
    from tandem.kernels.device import cross_entropy as device

    device.add_block(logits, targets, statistics, first=first, columns=columns, scale=scale)


@_add_block.register_fake
def _(logits: Tensor, targets: Tensor, statistics: Tensor, *, first: int, columns: int, scale: float) -> None:
    pass


@torch.library.custom_op("tandem::cross_entropy_gradient", mutates_args=("logits",), device_types="cpu")
def _write_block_gradient(
    logits: Tensor, targets: Tensor, maximum: Tensor, total_gradient: Tensor, target_logit_gradient: Tensor,
    *, first: int, columns: int, scale: float,
) -> None:  # fmt: skip
    """Write the gradient of a block of logits over them: zero in the padding after `columns`."""
    valid_logits = logits[:, :columns]
    z = valid_logits.to(maximum.dtype) * scale
    total_term = total_gradient[:, None] * (z - maximum[:, None]).exp()
    is_target = torch.arange(columns, device=logits.device) == (targets - first)[:, None]
    target_term = torch.where(is_target, target_logit_gradient[:, None], 0.0)
    valid_logits.copy_(scale * (total_term + target_term))
    logits[:, columns:] = 0


@_write_block_gradient.register_kernel("cuda")
def _(
    logits: Tensor, targets: Tensor, maximum: Tensor, total_gradient: Tensor, target_logit_gradient: Tensor,
    *, first: int, columns: int, scale: float,
) -> None:  # fmt: skip
    from tandem.kernels.device import cross_entropy as device

    gradients = total_gradient, target_logit_gradient
    device.write_block_gradient(logits, targets, maximum, *gradients, first=first, columns=columns, scale=scale)


@_write_block_gradient.register_fake
def _(
    logits: Tensor, targets: Tensor, maximum: Tensor, total_gradient: Tensor, target_logit_gradient: Tensor,
    *, first: int, columns: int, scale: float,
) -> None:  # fmt: skip
    pass


@torch.library.custom_op("tandem::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor, columns: int, scale: float) -> Tensor:
    statistics = initial_statistics(logits, targets)
    torch.ops.tandem.cross_entropy_add(logits, targets, statistics, first=0, columns=columns, scale=scale)
    return statistics


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, columns: int, scale: float) -> Tensor:
    return initial_statistics(logits, targets)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, ctx.columns, ctx.scale = inputs
    ctx.save_for_backward(logits, targets, output)


def _autograd_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    kept, targets, statistics = ctx.saved_tensors
    logits = kept.detach()  # shares its version counter, so autograd refuses to read the kept tensor again
    torch.ops.tandem.cross_entropy_gradient(
        logits, targets, statistics[0], gradient[1], gradient[2], first=0, columns=ctx.columns, scale=ctx.scale
    )
    return logits, None, None, None


_cross_entropy.register_autograd(_autograd_backward, setup_context=_setup_context)
