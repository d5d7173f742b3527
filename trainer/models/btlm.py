"""BTLM: ALiBi instead of position embeddings, biases everywhere, sequential residual, muP scales.

Source: Cerebras modelzoo `params_btlm_2p7b_2k.yaml` and `params_btlm_2p7b_8k.yaml`, and the released config.json.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from tandem.kernels.attention import alibi_slopes, attention
from tandem.kernels.qkv import split_qkv
from tandem.trainer.config import AlibiScalingConfig, BTLMConfig
from tandem.trainer.distributed.layers import LayerNorm, RowParallel
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.recompute import activation_checkpoint, call_directly
from tandem.trainer.models.decoder import (
    Decoder,
    FeedForward,
    PartialAttention,
    RecomputeMode,
    SequentialLayer,
    build_qkv_projection,
)
from tandem.trainer.models.kv_cache import KVCache
from tandem.trainer.models.mup import ForwardScales


@dataclass(frozen=True)
class LayerContext:
    slopes: Float32[Tensor, " num_heads_local"] | Float32[Tensor, "rows num_heads_local"]
    """ALiBi slopes, one set per row if rows differ."""
    document_starts: Int32[Tensor, "rows keys"] | None
    """Start of each key's document; None if attention may cross documents."""
    kv_cache: KVCache | None


class Attention(PartialAttention):
    """Multi-head attention with linear biases."""

    def __init__(
        self, config: BTLMConfig, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: RecomputeMode
    ) -> None:
        super().__init__()
        self.config, self.scale = config, scale
        self.qkv = build_qkv_projection(config, mesh, dtype, bias=True)
        self.out = RowParallel((config.hidden_size, config.hidden_size), config.hidden_size, mesh, dtype, bias=True)
        self.maybe_checkpoint = activation_checkpoint if recompute == "selective" else call_directly

    def attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: LayerContext
    ) -> Float[Tensor, "rows seq num_heads_local head_dim"]:
        query, key, value = split_qkv(qkv, head_dim=self.config.head_dim, num_queries_per_kv=1)
        if context.kv_cache is not None:
            key, value = context.kv_cache.update(self, key, value)
        return attention(
            query, key, value, scale=self.scale, slopes=context.slopes, document_starts=context.document_starts
        )


class BTLMDecoder(Decoder):
    config: BTLMConfig

    def __init__(
        self, config: BTLMConfig, scales: ForwardScales, mesh: Mesh, dtype: torch.dtype, recompute: RecomputeMode
    ) -> None:
        super().__init__(config, scales, mesh, dtype, recompute)
        # Not a buffer, because casting the module to bf16 would round the slopes.
        self.slopes = alibi_slopes(config.num_heads).chunk(mesh.tp_size)[mesh.tp_rank].to(mesh.device)

    def build_norm(self, dtype: torch.dtype) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, dtype, bias=True)

    def build_layer(self, dtype: torch.dtype, recompute: RecomputeMode) -> nn.Module:
        attention = Attention(self.config, self.scales.attention, self.mesh, dtype, recompute=recompute)
        ffn = FeedForward(self.config, self.mesh, dtype, bias=True, recompute=recompute)
        return SequentialLayer(attention, ffn, (self.build_norm(dtype), self.build_norm(dtype)))

    def layer_context(self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None) -> LayerContext:
        if kv_cache is None:  # `full`, because a copy from the host would make the device wait
            num_keys = torch.full((), document_ids.shape[1], device=document_ids.device)
        else:
            num_keys = kv_cache.row_lengths()
        slopes = interpolate_slopes(self.slopes, self.config.alibi_scaling, num_keys)
        return LayerContext(slopes, self.document_starts(document_ids, kv_cache), kv_cache)


def interpolate_slopes(
    slopes: Float32[Tensor, " num_heads_local"], scaling: AlibiScalingConfig | None, num_keys: Int64[Tensor, "*rows"]
) -> Float32[Tensor, "*rows_that_differ num_heads_local"]:
    """Interpolate positions by dividing the slopes by a fixed factor, or by the row's length over the trained length.

    Source: arXiv 2310.13017; the model card of cerebras/btlm-3b-8k-base.
    """
    if scaling is None:
        return slopes
    if scaling.train_seq_len is not None:
        return slopes / (num_keys.unsqueeze(-1) / scaling.train_seq_len).clamp(min=1.0)
    assert scaling.factor is not None
    return slopes / scaling.factor
