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
    compile_function,
    random_leaf,
    upcast,
)
from tandem.kernels.bench.shapes import (
    CUTE_LOGITS_SHAPES,
    LIGER_LOGITS_SHAPES,
    SMALL_MODELS,
    LogitsShape,
    logits_shapes,
)
from tandem.kernels.bench.single_rank import tensor_parallel_group

BYTES_PER_TOKEN = 8 + 4
"""A target, and an fp32 number between forward and backward."""
CHUNK_TOKENS = 1_024


def _make_example(shape: LogitsShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    inputs = (
        random_leaf((shape.tokens, shape.padded_vocab_size), device, dtype, generator),
        _random_targets(shape, device, generator),
    )
    return Example(inputs, (torch.ones((), device=device),))


def _make_linear_example(
    shape: LogitsShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    hidden = random_leaf((shape.tokens, shape.hidden_size), device, dtype, generator)
    weight = random_leaf(
        (shape.padded_vocab_size, shape.hidden_size), device, dtype, generator, shape.hidden_size**-0.5
    )
    return Example((hidden, weight, _random_targets(shape, device, generator)), (torch.ones((), device=device),))


def _per_token_example(make: Any) -> Any:
    """The same with a loss for each token, whose gradient is what the mean's would be."""

    def example(shape: LogitsShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
        gradient = torch.full((shape.tokens,), 1 / shape.tokens, device=device)
        return Example(make(shape, device, dtype, generator).inputs, (gradient,))

    return example


def _random_targets(shape: LogitsShape, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randint(shape.vocab_size, (shape.tokens,), device=device, generator=generator)


def _forward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """The true logits in."""
    return Work(shape.tokens * (shape.vocab_size * element_bytes + BYTES_PER_TOKEN))


def _backward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """The true logits in once more, the gradient of all out."""
    return Work(shape.tokens * ((shape.vocab_size + shape.padded_vocab_size) * element_bytes + BYTES_PER_TOKEN))


def _linear_forward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Hidden and weight in: one product."""
    moved = (shape.tokens + shape.vocab_size) * shape.hidden_size * element_bytes + shape.tokens * BYTES_PER_TOKEN
    product = 2 * shape.tokens * shape.hidden_size
    return Work(moved, product * shape.vocab_size, product * shape.padded_vocab_size)


def _linear_backward_work(shape: LogitsShape, element_bytes: int) -> Work:
    """Hidden and weight in, their gradients out: two products, three with the logits once more."""
    rows = 2 * shape.tokens + shape.vocab_size + shape.padded_vocab_size
    moved = rows * shape.hidden_size * element_bytes + shape.tokens * BYTES_PER_TOKEN
    product = 2 * shape.tokens * shape.hidden_size
    return Work(moved, 2 * product * shape.vocab_size, 3 * product * shape.padded_vocab_size)


def _our_losses(shape: LogitsShape) -> Function:
    from tandem.kernels.cross_entropy import cross_entropy

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        given = logits.view_as(logits)  # a leaf is refused
        maximum, total, target_logit = cross_entropy(
            given, targets, num_valid_columns=shape.vocab_size, scale=shape.logit_scale
        )
        return maximum - target_logit + total.log()

    return losses


def _our_linear_losses(shape: LogitsShape) -> Function:
    from tandem.kernels.linear_cross_entropy import linear_cross_entropy

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        parts = linear_cross_entropy(
            hidden, weight, targets, num_valid_columns=shape.vocab_size, scale=shape.logit_scale
        )
        return parts[0] - parts[2] + parts[1].log()

    return losses


def _mean_loss(losses: Any) -> Any:
    def function(shape: LogitsShape) -> Function:
        by_token = losses(shape)
        return lambda *inputs: by_token(*inputs).mean()

    return function


def _scaled_logits(shape: LogitsShape, logits: Tensor) -> Tensor:
    true = logits if shape.vocab_size == shape.padded_vocab_size else logits[:, : shape.vocab_size]
    return true if shape.logit_scale == 1.0 else true * shape.logit_scale


def _torch(shape: LogitsShape, reduction: str = "mean") -> Function:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_scaled_logits(shape, upcast(logits)), targets, reduction=reduction)

    return loss


def _liger(shape: LogitsShape) -> Function:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda logits, targets: LigerCrossEntropyFunction.apply(_scaled_logits(shape, logits), targets, None)[0]


def _liger_vocab_parallel(shape: LogitsShape) -> Function:
    from liger_kernel.megatron import LigerMegatronCrossEntropy

    loss = LigerMegatronCrossEntropy()
    return lambda logits, targets: loss(_scaled_logits(shape, logits)[:, None], targets[:, None]).mean()


def _megatron_fused(shape: LogitsShape) -> Function:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        group = tensor_parallel_group(logits.device.type)
        return fused_vocab_parallel_cross_entropy(
            _scaled_logits(shape, logits)[:, None], targets[:, None], group
        ).mean()

    return loss


def _megatron(shape: LogitsShape) -> Function:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        tensor_parallel_group(logits.device.type)
        return vocab_parallel_cross_entropy(_scaled_logits(shape, logits.float())[:, None], targets[:, None]).mean()

    return loss


def _torch_linear(shape: LogitsShape, reduction: str = "mean") -> Function:
    loss = _torch(shape, reduction)
    return lambda hidden, weight, targets: loss(hidden @ weight.t(), targets)


def _torch_chunked(shape: LogitsShape) -> Function:
    """By tokens, logits made again in backward."""

    def part(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_scaled_logits(shape, (hidden @ weight.t()).float()), targets, reduction="sum")

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        losses = [checkpoint(part, rows, weight, of_rows, use_reentrant=False) for rows, of_rows in chunks]
        return torch.stack(losses).sum() / len(targets)

    return loss


def _liger_linear(accum_dtype: torch.dtype | None) -> Any:
    def function(shape: LogitsShape) -> Function:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            true = weight[: shape.vocab_size]
            hidden = hidden if shape.logit_scale == 1.0 else hidden * shape.logit_scale
            return liger_fused_linear_cross_entropy(hidden, true, targets, accum_dtype=accum_dtype)

        return loss

    return function


def _liger_cute(shape: LogitsShape) -> Function:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    assert LigerFusedScaledCrossEntropySM90Function  # without which the other quietly takes plain torch
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight, targets: apply(
        hidden, weight[: shape.vocab_size], targets, 1 / shape.logit_scale
    ).mean()


def _launch_kernels(shape: LogitsShape) -> None:
    from tandem.kernels.cross_entropy import initial_statistics
    from tandem.kernels.device import cross_entropy as device

    values = torch.empty(shape.tokens, shape.padded_vocab_size, dtype=shape.dtype, device="meta")
    _launch_on_block(device, initial_statistics, values, shape)


def _launch_linear_kernels(shape: LogitsShape) -> None:
    from tandem.kernels.cross_entropy import initial_statistics
    from tandem.kernels.device import cross_entropy as device
    from tandem.kernels.linear_cross_entropy import columns_per_chunk

    width = min(columns_per_chunk(shape.padded_vocab_size), shape.padded_vocab_size)
    buffer = torch.empty(shape.tokens, width, dtype=shape.dtype, device="meta")
    for first in range(0, shape.padded_vocab_size, width):
        _launch_on_block(device, initial_statistics, buffer[:, : shape.padded_vocab_size - first], shape, first)


def _launch_on_block(device: Any, nothing_seen: Any, block: Tensor, shape: LogitsShape, first: int = 0) -> None:
    targets = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    statistics = nothing_seen(block, targets)
    known = {
        "first": first,
        "columns": min(max(shape.vocab_size - first, 0), block.shape[1]),
        "scale": shape.logit_scale,
    }
    device.add_block(block, targets, statistics, **known)
    device.write_block_gradient(block, targets, *statistics, **known)


CROSS_ENTROPY = Operation(
    name="cross_entropy",
    ceiling="copy",
    shapes=[*logits_shapes(tp_sizes=(1,)), *LIGER_LOGITS_SHAPES],
    extra_shapes=logits_shapes(tp_sizes=(2, 4)) + logits_shapes(SMALL_MODELS),
    make_example=_make_example,
    forward_work=_forward_work,
    backward_work=_backward_work,
    rivals=[
        Rival("ours", _mean_loss(_our_losses), needs_gpu=False),
        Rival("torch", _torch, needs_gpu=False),
        Rival("torch.compile", lambda shape: compile_function(_torch(shape)), is_slow_to_compile=True),
        Rival("liger", _liger),
        Rival("liger vocab-parallel", _liger_vocab_parallel),
        Rival("megatron fused", _megatron_fused, is_slow_to_compile=True),
        Rival("megatron", _megatron, needs_gpu=False),
    ],
    launch_kernels=_launch_kernels,
    precision=Precision(
        ("losses", "d logits"),
        _our_losses,
        functools.partial(_torch, reduction="none"),
        _per_token_example(_make_example),
    ),
)

LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    ceiling="matmul",
    shapes=[*logits_shapes(tp_sizes=(1,)), *CUTE_LOGITS_SHAPES],
    extra_shapes=logits_shapes(tp_sizes=(2, 4)) + logits_shapes(SMALL_MODELS),
    make_example=_make_linear_example,
    forward_work=_linear_forward_work,
    backward_work=_linear_backward_work,
    rivals=[
        Rival("ours", _mean_loss(_our_linear_losses), needs_gpu=False),
        Rival("torch", _torch_linear, needs_gpu=False),
        Rival("torch.compile", lambda shape: compile_function(_torch_linear(shape)), is_slow_to_compile=True),
        Rival("torch in chunks", _torch_chunked, needs_gpu=False),
        Rival("liger", _liger_linear(None)),
        Rival("liger, fp32 sums", _liger_linear(torch.float32)),
        Rival("liger CuTe", _liger_cute),
    ],
    launch_kernels=_launch_linear_kernels,
    precision=Precision(
        ("losses", "d hidden", "d weight"),
        _our_linear_losses,
        functools.partial(_torch_linear, reduction="none"),
        _per_token_example(_make_linear_example),
    ),
)
