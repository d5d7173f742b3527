"""Rivals of both cross-entropies.

The loss is a mean, because Liger's fast path needs a backward that starts at the loss, with a gradient of 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.kernels.bench.ops import OPERATIONS, Function, scaled_logits
from tandem.kernels.bench.shapes import Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival, own_rivals
from tests.rivals.kernels.ops.compiled import compiled_rival
from tests.rivals.kernels.shapes import CUTE_LOGITS_SHAPES, LIGER_LOGITS_SHAPES
from tests.rivals.kernels.single_rank import tensor_parallel_group

CHUNK_TOKENS = 1_024


def _liger(shape: Shape) -> Function:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda logits, targets: LigerCrossEntropyFunction.apply(scaled_logits(shape, logits), targets, None)[0]


def _liger_vocab_parallel(shape: Shape) -> Function:
    from liger_kernel.megatron import LigerMegatronCrossEntropy

    loss = LigerMegatronCrossEntropy()
    return lambda logits, targets: loss(scaled_logits(shape, logits)[:, None], targets[:, None]).mean()


def _megatron_fused(shape: Shape) -> Function:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        group, scaled = tensor_parallel_group(logits.device.type), scaled_logits(shape, logits)
        return fused_vocab_parallel_cross_entropy(scaled[:, None], targets[:, None], group).mean()

    return loss


def _megatron(shape: Shape) -> Function:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        tensor_parallel_group(logits.device.type)
        return vocab_parallel_cross_entropy(scaled_logits(shape, logits.float())[:, None], targets[:, None]).mean()

    return loss


def _torch_chunked(shape: Shape) -> Function:
    """Chunks of tokens, whose logits backward computes again."""

    def part(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scaled_logits(shape, (hidden @ weight.t()).float()), targets, reduction="sum")

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        losses = [checkpoint(part, rows, weight, of_rows, use_reentrant=False) for rows, of_rows in chunks]
        return torch.stack(losses).sum() / len(targets)

    return loss


def _liger_linear(accum_dtype: torch.dtype | None) -> Callable[[Shape], Function]:
    def function(shape: Shape) -> Function:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            true = weight[: shape.vocab_size]
            hidden = hidden if shape.logit_scale == 1.0 else hidden * shape.logit_scale
            return liger_fused_linear_cross_entropy(hidden, true, targets, accum_dtype=accum_dtype)

        return loss

    return function


def _liger_cute(shape: Shape) -> Function:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    assert LigerFusedScaledCrossEntropySM90Function  # without it the other one silently falls back to plain torch
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    scale = 1 / shape.logit_scale
    return lambda hidden, weight, targets: apply(hidden, weight[: shape.vocab_size], targets, scale).mean()


CROSS_ENTROPY = ContestedOperation(
    OPERATIONS["cross_entropy"],
    shapes=LIGER_LOGITS_SHAPES,
    rivals=[
        *own_rivals(OPERATIONS["cross_entropy"]),
        compiled_rival(OPERATIONS["cross_entropy"].plain),
        Rival("liger", _liger),
        Rival("liger vocab-parallel", _liger_vocab_parallel),
        Rival("megatron fused", _megatron_fused, is_slow_to_compile=True),
        Rival("megatron", _megatron, needs_gpu=False),
    ],
)
LINEAR_CROSS_ENTROPY = ContestedOperation(
    OPERATIONS["linear_cross_entropy"],
    shapes=CUTE_LOGITS_SHAPES,
    rivals=[
        *own_rivals(OPERATIONS["linear_cross_entropy"]),
        compiled_rival(OPERATIONS["linear_cross_entropy"].plain),
        Rival("torch in chunks", _torch_chunked, needs_gpu=False),
        Rival("liger", _liger_linear(None)),
        Rival("liger, fp32 sums", _liger_linear(torch.float32)),
        Rival("liger CuTe", _liger_cute),
    ],
)
