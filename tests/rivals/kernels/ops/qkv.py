"""Rivals of splitting and rotating a fused projection."""

import torch
from torch import Tensor

from tandem.kernels.bench.compare import NotMeasured
from tandem.kernels.bench.ops import OPERATIONS, Function, split_heads
from tandem.kernels.bench.shapes import Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival, own_rivals
from tests.rivals.kernels.ops.compiled import compiled_rival


def _liger(shape: Shape) -> Function:
    """Liger's LayerNorm has one weight for all heads, so the norms are torch's. Its tables hold every angle twice."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = split_heads(shape, qkv, weights)
        tables = (torch.cat((table, table), -1) for table in (cos, sin))
        turned = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2), value

    return rotated


def _megatron(shape: Shape) -> Function:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb as fused

    if fused is None:
        raise ImportError("Megatron's fused rotary positions need Transformer Engine")
    if shape.document_masking:
        raise NotMeasured("Megatron's fused rotary positions have one table for all rows")

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = split_heads(shape, qkv, weights)
        angles = torch.atan2(sin, cos)[0, :, None, None]
        tables = torch.cat((angles, angles), -1)
        turned = (fused(x.transpose(0, 1), tables).transpose(0, 1) for x in (query, key))
        return *turned, value

    return rotated


QKV = ContestedOperation(
    OPERATIONS["qkv"],
    rivals=[
        *own_rivals(OPERATIONS["qkv"]),
        compiled_rival(OPERATIONS["qkv"].plain),
        Rival("liger rope", _liger),
        Rival("megatron rope", _megatron),
    ],
)
