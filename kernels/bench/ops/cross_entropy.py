"""Mean cross-entropy over a vocabulary, from logits and from what precedes them.

The mean, because Liger's fast way is for a loss that backward begins at, with a gradient of 1. Padded columns and a scale of
the logits are ours only: rivals get the true columns, scaled beforehand, as whoever used them here would have to.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Rival,
    Work,
    at_least_fp32,
    compiled,
    leaf,
)
from tandem.kernels.bench.shapes import CUTE_LOGITS, LIGER_LOGITS, SMALL_MODELS, Logits, logits
from tandem.kernels.bench.single_rank import tensor_parallel_group

TOKEN_BYTES = 8 + 4
"""A target, and an fp32 number between forward and backward."""
CHUNK_TOKENS = 1_024


def _example(shape: Logits, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    inputs = leaf((shape.tokens, shape.columns), device, dtype, generator), _targets(shape, device, generator)
    return Example(inputs, (torch.ones((), device=device),))


def _linear_example(shape: Logits, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    hidden = leaf((shape.tokens, shape.width), device, dtype, generator)
    weight = leaf((shape.columns, shape.width), device, dtype, generator, shape.width**-0.5)
    return Example((hidden, weight, _targets(shape, device, generator)), (torch.ones((), device=device),))


def _by_token(make: Any) -> Any:
    """The same with a loss for each token, whose gradient is what the mean's would be."""

    def example(shape: Logits, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
        gradient = torch.full((shape.tokens,), 1 / shape.tokens, device=device)
        return Example(make(shape, device, dtype, generator).inputs, (gradient,))

    return example


def _targets(shape: Logits, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randint(shape.vocab, (shape.tokens,), device=device, generator=generator)


def _forward(shape: Logits, element_bytes: int) -> Work:
    """The true logits in."""
    return Work(shape.tokens * (shape.vocab * element_bytes + TOKEN_BYTES))


def _backward(shape: Logits, element_bytes: int) -> Work:
    """The true logits in once more, the gradient of all out."""
    return Work(shape.tokens * ((shape.vocab + shape.columns) * element_bytes + TOKEN_BYTES))


def _linear_forward(shape: Logits, element_bytes: int) -> Work:
    """Hidden and weight in: one product."""
    moved = (shape.tokens + shape.vocab) * shape.width * element_bytes + shape.tokens * TOKEN_BYTES
    product = 2 * shape.tokens * shape.width
    return Work(moved, product * shape.vocab, product * shape.columns)


def _linear_backward(shape: Logits, element_bytes: int) -> Work:
    """Hidden and weight in, their gradients out: two products, three with the logits once more."""
    rows = 2 * shape.tokens + shape.vocab + shape.columns
    moved = rows * shape.width * element_bytes + shape.tokens * TOKEN_BYTES
    product = 2 * shape.tokens * shape.width
    return Work(moved, 2 * product * shape.vocab, 3 * product * shape.columns)


def _our_losses(shape: Logits) -> Function:
    from tandem.kernels.cross_entropy import cross_entropy

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        given = logits.view_as(logits)  # a leaf is refused
        maximum, total, target_logit = cross_entropy(given, targets, columns=shape.vocab, scale=shape.scale)
        return maximum - target_logit + total.log()

    return losses


def _our_linear_losses(shape: Logits) -> Function:
    from tandem.kernels.linear_cross_entropy import linear_cross_entropy

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        parts = linear_cross_entropy(hidden, weight, targets, columns=shape.vocab, scale=shape.scale)
        return parts[0] - parts[2] + parts[1].log()

    return losses


def _mean(losses: Any) -> Any:
    def function(shape: Logits) -> Function:
        by_token = losses(shape)
        return lambda *inputs: by_token(*inputs).mean()

    return function


def _scaled(shape: Logits, logits: Tensor) -> Tensor:
    true = logits if shape.vocab == shape.columns else logits[:, : shape.vocab]
    return true if shape.scale == 1.0 else true * shape.scale


def _torch(shape: Logits, reduction: str = "mean") -> Function:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_scaled(shape, at_least_fp32(logits)), targets, reduction=reduction)

    return loss


def _liger(shape: Logits) -> Function:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda logits, targets: LigerCrossEntropyFunction.apply(_scaled(shape, logits), targets, None)[0]


def _liger_parallel(shape: Logits) -> Function:
    from liger_kernel.megatron import LigerMegatronCrossEntropy

    loss = LigerMegatronCrossEntropy()
    return lambda logits, targets: loss(_scaled(shape, logits)[:, None], targets[:, None]).mean()


def _megatron_fused(shape: Logits) -> Function:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        group = tensor_parallel_group(logits.device.type)
        return fused_vocab_parallel_cross_entropy(_scaled(shape, logits)[:, None], targets[:, None], group).mean()

    return loss


def _megatron(shape: Logits) -> Function:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        tensor_parallel_group(logits.device.type)
        return vocab_parallel_cross_entropy(_scaled(shape, logits.float())[:, None], targets[:, None]).mean()

    return loss


def _torch_linear(shape: Logits, reduction: str = "mean") -> Function:
    loss = _torch(shape, reduction)
    return lambda hidden, weight, targets: loss(hidden @ weight.t(), targets)


def _chunked(shape: Logits) -> Function:
    """By tokens, logits made again in backward."""

    def part(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_scaled(shape, (hidden @ weight.t()).float()), targets, reduction="sum")

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        losses = [checkpoint(part, rows, weight, of_rows, use_reentrant=False) for rows, of_rows in chunks]
        return torch.stack(losses).sum() / len(targets)

    return loss


def _liger_linear(accum_dtype: torch.dtype | None) -> Any:
    def function(shape: Logits) -> Function:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            true = weight[: shape.vocab]
            hidden = hidden if shape.scale == 1.0 else hidden * shape.scale
            return liger_fused_linear_cross_entropy(hidden, true, targets, accum_dtype=accum_dtype)

        return loss

    return function


def _liger_cute(shape: Logits) -> Function:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    assert LigerFusedScaledCrossEntropySM90Function  # without which the other quietly takes plain torch
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight, targets: apply(hidden, weight[: shape.vocab], targets, 1 / shape.scale).mean()


def _launches(shape: Logits) -> None:
    from tandem.kernels.cross_entropy import nothing_seen
    from tandem.kernels.device import cross_entropy as device

    values = torch.empty(shape.tokens, shape.columns, dtype=shape.dtype, device="meta")
    _on_block(device, nothing_seen, values, shape)


def _linear_launches(shape: Logits) -> None:
    from tandem.kernels.cross_entropy import nothing_seen
    from tandem.kernels.device import cross_entropy as device
    from tandem.kernels.linear_cross_entropy import chunk_width

    width = min(chunk_width(shape.columns), shape.columns)
    buffer = torch.empty(shape.tokens, width, dtype=shape.dtype, device="meta")
    for first in range(0, shape.columns, width):
        _on_block(device, nothing_seen, buffer[:, : shape.columns - first], shape, first)


def _on_block(device: Any, nothing_seen: Any, block: Tensor, shape: Logits, first: int = 0) -> None:
    targets = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    statistics = nothing_seen(block, targets)
    known = {"first": first, "columns": min(max(shape.vocab - first, 0), block.shape[1]), "scale": shape.scale}
    device.add(block, targets, statistics, **known)
    device.gradient(block, targets, *statistics, **known)


CROSS_ENTROPY = Operation(
    name="cross_entropy",
    ceiling="copy",
    shapes=[*logits(tp_sizes=(1,)), *LIGER_LOGITS],
    more_shapes=logits(tp_sizes=(2, 4)) + logits(SMALL_MODELS),
    example=_example,
    forward=_forward,
    backward=_backward,
    rivals=[
        Rival("ours", _mean(_our_losses), gpu=False),
        Rival("torch", _torch, gpu=False),
        Rival("torch.compile", lambda shape: compiled(_torch(shape)), compiles=True),
        Rival("liger", _liger),
        Rival("liger vocab-parallel", _liger_parallel),
        Rival("megatron fused", _megatron_fused, compiles=True),
        Rival("megatron", _megatron, gpu=False),
    ],
    launches=_launches,
    precision=Precision(
        ("losses", "d logits"), _our_losses, functools.partial(_torch, reduction="none"), _by_token(_example)
    ),
)

LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    ceiling="matmul",
    shapes=[*logits(tp_sizes=(1,)), *CUTE_LOGITS],
    more_shapes=logits(tp_sizes=(2, 4)) + logits(SMALL_MODELS),
    example=_linear_example,
    forward=_linear_forward,
    backward=_linear_backward,
    rivals=[
        Rival("ours", _mean(_our_linear_losses), gpu=False),
        Rival("torch", _torch_linear, gpu=False),
        Rival("torch.compile", lambda shape: compiled(_torch_linear(shape)), compiles=True),
        Rival("torch in chunks", _chunked, gpu=False),
        Rival("liger", _liger_linear(None)),
        Rival("liger, fp32 sums", _liger_linear(torch.float32)),
        Rival("liger CuTe", _liger_cute),
    ],
    launches=_linear_launches,
    precision=Precision(
        ("losses", "d hidden", "d weight"),
        _our_linear_losses,
        functools.partial(_torch_linear, reduction="none"),
        _by_token(_linear_example),
    ),
)
