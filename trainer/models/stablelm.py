"""Stable LM 2: partial rotary positions, optional per-head QK norm, grouped keys, parallel or sequential residual.

Source: Stability-AI/StableLM `configs/stablelm-2-12b.yml` and `stablelm-2-1_6b.yml`, and the model cards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from tandem.kernels.attention import attention
from tandem.kernels.qkv import split_rotated
from tandem.kernels.rope import rotary_table
from tandem.trainer.config import StableLM
from tandem.trainer.distributed.layers import LayerNorm, Row, divided, to_columns
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.recompute import again_in_backward, kept
from tandem.trainer.models.decoder import (
    Decoder,
    FeedForward,
    PartialAttention,
    Recompute,
    SequentialLayer,
    join_heads,
    qkv_projection,
    residual,
)
from tandem.trainer.models.kv_cache import Cache
from tandem.trainer.models.mup import ForwardScales


@dataclass(frozen=True)
class Context:
    cos: Float32[Tensor, "any_rows seq half"]
    sin: Float32[Tensor, "any_rows seq half"]
    starts: Int32[Tensor, "rows keys"] | None
    """Of the documents, where attention stays within them."""
    cache: Cache | None


class HeadNorm(nn.Module):
    """Of a LayerNorm over head_dim without bias the weights, one vector for every head; None where there is no norm."""

    def __init__(self, heads: int, section: StableLM, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = divided((heads, section.head_dim), mesh, dtype, "norm") if section.qk_norm else None


class Attention(PartialAttention):
    """Grouped-query attention; returns this rank's partial sum."""

    def __init__(
        self, section: StableLM, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute
    ) -> None:
        super().__init__()
        self.section, self.scale = section, scale
        self.qkv = qkv_projection(section, mesh, dtype, bias=section.qkv_bias)
        self.query_norm = HeadNorm(section.heads, section, mesh, dtype)
        self.key_norm = HeadNorm(section.kv_heads, section, mesh, dtype)
        self.out = Row((section.width, section.width), section.width, mesh, dtype, bias=False)
        self.run = again_in_backward if recompute == "selective" else kept

    def forward(self, columns: Float[Tensor, "seq rows width"], context: Context) -> Float[Tensor, "seq rows width"]:
        qkv = self.qkv(columns)
        return self.out(join_heads(self.run(self._attend, qkv, context)))

    def _attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: Context
    ) -> Float[Tensor, "rows seq heads_local head_dim"]:
        section = self.section
        query, key, value = split_rotated(
            qkv, context.cos, context.sin, head_dim=section.head_dim, queries=section.heads // section.kv_heads,
            query_norm=self.query_norm.weight, key_norm=self.key_norm.weight, epsilon=section.norm_epsilon,
        )  # fmt: skip
        if context.cache is not None:
            key, value = context.cache.extended(self, key, value)
        return attention(query, key, value, scale=self.scale, slopes=None, starts=context.starts)


class ParallelLayer(nn.Module):
    """x + attention(norm(x)) + ffn(norm(x)): one norm, one all-reduce forward and one backward."""

    def __init__(self, attention: Attention, ffn: FeedForward, norm: LayerNorm) -> None:
        super().__init__()
        self.attention_norm = norm
        self.attention, self.ffn = attention, ffn

    def forward(self, stream: Float[Tensor, "seq rows width"], context: Context) -> Float[Tensor, "seq rows width"]:
        columns = to_columns(self.attention_norm(stream))
        return residual(stream, self.attention(columns, context) + self.ffn(columns), None)


class StableLMDecoder(Decoder):
    section: StableLM

    def context(self, documents: Int32[Tensor, "rows seq"], cache: Cache | None) -> Context:
        section, seq = self.section, documents.shape[1]
        starts = self.apart(documents, cache)
        keys = seq if cache is None else cache.documents.shape[1]
        row = torch.arange(keys, device=documents.device)[None]
        row = row if starts is None else row - starts
        rotated = int(section.rotary_fraction * section.head_dim)
        cos, sin = rotary_table(row[:, -seq:], rotated, section.rotary_base)
        return Context(cos, sin, starts, cache)


def build(section: StableLM, scales: ForwardScales, mesh: Mesh, dtype: torch.dtype, recompute: Recompute) -> Decoder:
    """The model with uninitialised weights, this rank's share."""

    def norm() -> LayerNorm:
        return LayerNorm(section.width, section.norm_epsilon, dtype, bias=section.norm_bias)

    def layer() -> nn.Module:
        attend = Attention(section, scales.attention, mesh, dtype, recompute=recompute)
        ffn = FeedForward(section, mesh, dtype, bias=False, recompute=recompute)
        return (
            ParallelLayer(attend, ffn, norm())
            if section.parallel_residual
            else SequentialLayer(attend, ffn, (norm(), norm()))
        )

    layers = [layer() for _ in range(section.depth)]
    return StableLMDecoder(section, scales, layers, norm(), mesh, dtype, recompute=recompute)
