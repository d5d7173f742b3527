"""BTLM: ALiBi instead of position embeddings, biases everywhere, sequential residual, muP scales.

Source: Cerebras modelzoo `params_btlm_2p7b_2k.yaml` and `params_btlm_2p7b_8k.yaml`, and the released config.json.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from tandem.kernels.attention import alibi_slopes, attention
from tandem.kernels.qkv import split
from tandem.trainer.config import BTLM, AlibiScaling
from tandem.trainer.distributed.layers import LayerNorm, Row
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
)
from tandem.trainer.models.kv_cache import Cache
from tandem.trainer.models.mup import ForwardScales


@dataclass(frozen=True)
class Context:
    slopes: Float32[Tensor, " heads_local"] | Float32[Tensor, "rows heads_local"]
    """Of the bias; one set for each row where rows differ."""
    starts: Int32[Tensor, "rows keys"] | None
    """Of the documents, where attention stays within them."""
    cache: Cache | None


class Attention(PartialAttention):
    """Attention with linear biases; returns this rank's partial sum, without the output bias."""

    def __init__(self, section: BTLM, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute) -> None:
        super().__init__()
        self.section, self.scale = section, scale
        self.qkv = qkv_projection(section, mesh, dtype, bias=True)
        self.out = Row((section.width, section.width), section.width, mesh, dtype, bias=True)
        self.run = again_in_backward if recompute == "selective" else kept

    def forward(self, columns: Float[Tensor, "seq rows width"], context: Context) -> Float[Tensor, "seq rows width"]:
        qkv = self.qkv(columns)
        return self.out(join_heads(self.run(self._attend, qkv, context)))

    def _attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: Context
    ) -> Float[Tensor, "rows seq heads_local head_dim"]:
        query, key, value = split(qkv, head_dim=self.section.head_dim, queries=1)
        if context.cache is not None:
            key, value = context.cache.extended(self, key, value)
        return attention(query, key, value, scale=self.scale, slopes=context.slopes, starts=context.starts)


class BTLMDecoder(Decoder):
    section: BTLM

    def __init__(
        self, section: BTLM, scales: ForwardScales, layers: list[nn.Module], final_norm: LayerNorm,
        mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute,
    ) -> None:  # fmt: skip
        super().__init__(section, scales, layers, final_norm, mesh, dtype, recompute=recompute)
        # Not a buffer: casting the module to bf16 would cast the slopes with it, and a bf16 slope bends the bias.
        self.slopes = alibi_slopes(section.heads).chunk(mesh.tp_size)[mesh.tp_rank].to(mesh.device)

    def context(self, documents: Int32[Tensor, "rows seq"], cache: Cache | None) -> Context:
        # A fill rather than a copy from the host, which the device would wait for.
        keys = torch.full((), documents.shape[1], device=documents.device) if cache is None else cache.lengths()
        slopes = interpolated(self.slopes, self.section.alibi_scaling, keys)
        return Context(slopes, self.apart(documents, cache), cache)


def interpolated(
    slopes: Float32[Tensor, " heads_local"], scaling: AlibiScaling | None, keys: Int64[Tensor, "*rows"]
) -> Float32[Tensor, "*rows_that_differ heads_local"]:
    """The slopes for rows of so many keys: divided by the factor, or by how many times longer than trained a row is.

    Source: arXiv 2310.13017; the model card of cerebras/btlm-3b-8k-base.
    """
    if scaling is None:
        return slopes
    if scaling.train_seq_len is not None:
        return slopes / (keys.unsqueeze(-1) / scaling.train_seq_len).clamp(min=1.0)
    assert scaling.factor is not None
    return slopes / scaling.factor


def build(section: BTLM, scales: ForwardScales, mesh: Mesh, dtype: torch.dtype, recompute: Recompute) -> Decoder:
    """The model with uninitialised weights, this rank's share."""

    def norm() -> LayerNorm:
        return LayerNorm(section.width, section.norm_epsilon, dtype, bias=True)

    def layer() -> nn.Module:
        attend = Attention(section, scales.attention, mesh, dtype, recompute=recompute)
        ffn = FeedForward(section, mesh, dtype, bias=True, recompute=recompute)
        return SequentialLayer(attend, ffn, (norm(), norm()))

    layers = [layer() for _ in range(section.depth)]
    return BTLMDecoder(section, scales, layers, norm(), mesh, dtype, recompute=recompute)
