"""Stable LM 2: partial rotary positions, optional per-head QK norm, grouped keys, parallel or sequential residual.

Source: Stability-AI/StableLM `configs/stablelm-2-12b.yml` and `stablelm-2-1_6b.yml`, and the model cards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from kernels.attention import attention
from kernels.layer_norm import head_norm
from kernels.rope import positions, rotary_table, rotate
from trainer.config import StableLM
from trainer.models.cache import Cache
from trainer.models.layers import (
    Decoder,
    FeedForward,
    PartialAttention,
    Recompute,
    SequentialLayer,
    join_heads,
    qkv_projection,
    residual,
    split_heads,
)
from trainer.models.mup import ForwardScales
from trainer.parallel.layers import LayerNorm, Row, divided, to_columns
from trainer.parallel.mesh import Mesh
from trainer.parallel.recompute import again_in_backward, kept


@dataclass(frozen=True)
class Context:
    cos: Float32[Tensor, "any_rows seq half"]
    sin: Float32[Tensor, "any_rows seq half"]
    documents: Int32[Tensor, "rows keys"] | None
    """Where attention stays within them."""
    cache: Cache | None


class HeadNorm(nn.Module):
    """LayerNorm over head_dim, one weight vector for every head, no bias."""

    def __init__(self, heads: int, section: StableLM, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.epsilon = section.norm_epsilon
        self.weight = divided((heads, section.head_dim), mesh, dtype, "norm")

    def forward(
        self, heads: Float[Tensor, "rows seq heads_local head_dim"]
    ) -> Float[Tensor, "rows seq heads_local head_dim"]:
        return head_norm(heads, self.weight, self.epsilon)


class Attention(PartialAttention):
    """Grouped-query attention; returns this rank's partial sum."""

    def __init__(
        self, section: StableLM, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute
    ) -> None:
        super().__init__()
        self.section, self.scale = section, scale
        self.qkv = qkv_projection(section, mesh, dtype, bias=section.qkv_bias)
        self.query_norm = HeadNorm(section.heads, section, mesh, dtype) if section.qk_norm else nn.Identity()
        self.key_norm = HeadNorm(section.kv_heads, section, mesh, dtype) if section.qk_norm else nn.Identity()
        self.out = Row((section.width, section.width), section.width, mesh, dtype, bias=False)
        self.run = again_in_backward if recompute == "selective" else kept

    def forward(self, columns: Float[Tensor, "seq rows width"], context: Context) -> Float[Tensor, "seq rows width"]:
        qkv = self.qkv(columns)
        return self.out(join_heads(self.run(self._attend, qkv, context)))

    def _attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: Context
    ) -> Float[Tensor, "rows seq heads_local head_dim"]:
        query, key, value = split_heads(qkv, self.section)
        query = rotate(self.query_norm(query), context.cos, context.sin)
        key = rotate(self.key_norm(key), context.cos, context.sin)
        if context.cache is not None:
            key, value = context.cache.extended(self, key, value)
        return attention(query, key, value, scale=self.scale, slopes=None, documents=context.documents)


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
        apart = self.apart(documents, cache)
        keys = seq if cache is None else cache.documents.shape[1]
        row = torch.arange(keys, device=documents.device)[None] if apart is None else positions(apart)
        rotated = int(section.rotary_fraction * section.head_dim)
        cos, sin = rotary_table(row[:, -seq:], rotated, section.rotary_base)
        return Context(cos, sin, apart, cache)


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
