"""Stable LM 2: partial rotary positions, optional per-head QK norm, grouped keys, parallel or sequential residual.

Source: Stability-AI/StableLM `configs/stablelm-2-12b.yml` and `stablelm-2-1_6b.yml`, and the model cards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from tandem.kernels.attention import attention
from tandem.kernels.qkv import split_and_rotate_qkv
from tandem.kernels.rope import rotary_table
from tandem.trainer.config import StableLMConfig
from tandem.trainer.distributed.layers import LayerNorm, RowParallel, copy_to_tp, sharded_parameter
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.recompute import activation_checkpoint, call_directly
from tandem.trainer.models.decoder import (
    Decoder,
    FeedForward,
    PartialAttention,
    RecomputeMode,
    SequentialLayer,
    add_residual,
    build_qkv_projection,
)
from tandem.trainer.models.kv_cache import KVCache


@dataclass(frozen=True)
class LayerContext:
    cos: Float32[Tensor, "any_rows seq half"]
    sin: Float32[Tensor, "any_rows seq half"]
    document_starts: Int32[Tensor, "rows keys"] | None
    """Start of each key's document; None if attention may cross documents."""
    kv_cache: KVCache | None


class HeadNorm(nn.Module):
    """The weights of a LayerNorm over head_dim, one vector per head without bias, or None without QK norm."""

    def __init__(self, num_heads: int, config: StableLMConfig, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        shape = num_heads, config.head_dim
        self.weight = sharded_parameter(shape, mesh, dtype, "norm") if config.qk_layernorm else None


class Attention(PartialAttention):
    """Grouped-query attention with rotary positions and optional QK norm."""

    def __init__(
        self, config: StableLMConfig, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: RecomputeMode
    ) -> None:
        super().__init__()
        self.config, self.scale = config, scale
        self.qkv = build_qkv_projection(config, mesh, dtype, bias=config.qkv_bias)
        self.query_norm = HeadNorm(config.num_heads, config, mesh, dtype)
        self.key_norm = HeadNorm(config.num_kv_heads, config, mesh, dtype)
        self.out = RowParallel((config.hidden_size, config.hidden_size), config.hidden_size, mesh, dtype, bias=False)
        self.maybe_checkpoint = activation_checkpoint if recompute == "selective" else call_directly

    def attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: LayerContext
    ) -> Float[Tensor, "rows seq num_heads_local head_dim"]:
        config = self.config
        query, key, value = split_and_rotate_qkv(
            qkv, context.cos, context.sin, head_dim=config.head_dim, num_queries_per_kv=config.num_heads // config.num_kv_heads,
            query_norm=self.query_norm.weight, key_norm=self.key_norm.weight, norm_eps=config.norm_eps,
        )  # fmt: skip
        if context.kv_cache is not None:
            key, value = context.kv_cache.update(self, key, value)
        return attention(query, key, value, scale=self.scale, slopes=None, document_starts=context.document_starts)


class ParallelLayer(nn.Module):
    """x + attention(norm(x)) + ffn(norm(x)), with one norm, and one all-reduce each in forward and backward."""

    def __init__(self, attention: Attention, ffn: FeedForward, norm: LayerNorm) -> None:
        super().__init__()
        self.attention_norm = norm
        self.attention, self.ffn = attention, ffn

    def forward(
        self, hidden_states: Float[Tensor, "seq rows hidden_size"], context: LayerContext
    ) -> Float[Tensor, "seq rows hidden_size"]:
        normalized = copy_to_tp(self.attention_norm(hidden_states))
        return add_residual(hidden_states, self.attention(normalized, context) + self.ffn(normalized), None)


class StableLMDecoder(Decoder):
    config: StableLMConfig

    def build_norm(self, dtype: torch.dtype) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, dtype, bias=self.config.norm_bias)

    def build_layer(self, dtype: torch.dtype, recompute: RecomputeMode) -> nn.Module:
        attention = Attention(self.config, self.scales.attention, self.mesh, dtype, recompute=recompute)
        ffn = FeedForward(self.config, self.mesh, dtype, bias=False, recompute=recompute)
        if self.config.parallel_residual:
            return ParallelLayer(attention, ffn, self.build_norm(dtype))
        return SequentialLayer(attention, ffn, (self.build_norm(dtype), self.build_norm(dtype)))

    def layer_context(self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None) -> LayerContext:
        config, seq_len = self.config, document_ids.shape[1]
        document_starts = self.document_starts(document_ids, kv_cache)
        keys = seq_len if kv_cache is None else kv_cache.document_ids.shape[1]
        positions = torch.arange(keys, device=document_ids.device)[None]
        positions = positions if document_starts is None else positions - document_starts
        rotary_dim = int(config.partial_rotary_factor * config.head_dim)
        cos, sin = rotary_table(positions[:, -seq_len:], rotary_dim, config.rotary_base)
        return LayerContext(cos, sin, document_starts, kv_cache)
