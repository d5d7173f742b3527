"""Rivals of splitting and rotating a fused projection."""

from dataclasses import replace

import torch
from torch import Tensor

from tandem.kernels.bench.operation import Function, Rival, SkipRival
from tandem.kernels.bench.ops import qkv as ours
from tandem.kernels.bench.ops.qkv import split_heads, torch_qkv
from tandem.kernels.bench.shapes import AttentionShape
from tests.rivals.kernels.ops.compiled import compiled_rival


def _liger(shape: AttentionShape) -> Function:
    """Liger's LayerNorm has one weight for all heads, so the norms are torch's. Its tables hold every angle twice."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = split_heads(shape, qkv, weights)
        tables = (torch.cat((table, table), -1) for table in (cos, sin))
        turned = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2), value

    return rotated


def _megatron(shape: AttentionShape) -> Function:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb as fused

    if fused is None:
        raise ImportError("Megatron's fused rotary positions need Transformer Engine")
    if shape.document_masking:
        raise SkipRival("Megatron's fused rotary positions have one table for all rows")

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = split_heads(shape, qkv, weights)
        angles = torch.atan2(sin, cos)[0, :, None, None]
        tables = torch.cat((angles, angles), -1)
        turned = (fused(x.transpose(0, 1), tables).transpose(0, 1) for x in (query, key))
        return *turned, value

    return rotated


QKV = replace(
    ours.QKV,
    rivals=[
        *ours.QKV.rivals, compiled_rival(torch_qkv), Rival("liger rope", _liger), Rival("megatron rope", _megatron)
    ],
)  # fmt: skip
