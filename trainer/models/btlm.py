"""BTLM: ALiBi instead of position embeddings, biases everywhere, sequential residual, muP scales.

Source: Cerebras modelzoo `params_btlm_2p7b_2k.yaml` and `params_btlm_2p7b_8k.yaml`, and the released config.json.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from kernels.attention import alibi_slopes, attention
from trainer.config import BTLM
from trainer.models.layers import (
    Decoder,
    FeedForward,
    PartialAttention,
    Recompute,
    SequentialLayer,
    join_heads,
    qkv_projection,
    split_heads,
)
from trainer.models.mup import ForwardScales
from trainer.parallel.layers import LayerNorm, Row
from trainer.parallel.mesh import Mesh
from trainer.parallel.recompute import again_in_backward, kept

Context = Int32[Tensor, "rows seq"] | None
"""The documents where attention stays within them."""


class Attention(PartialAttention):
    """Attention with linear biases; returns this rank's partial sum, without the output bias."""

    def __init__(self, section: BTLM, scale: float, mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute) -> None:
        super().__init__()
        self.section, self.scale = section, scale
        self.qkv = qkv_projection(section, mesh, dtype, bias=True)
        self.out = Row((section.width, section.width), section.width, mesh, dtype, bias=True)
        # Not a buffer: casting the module to bf16 would cast the slopes with it, and a bf16 slope bends the bias.
        self.slopes = alibi_slopes(section.heads).chunk(mesh.tp_size)[mesh.tp_rank].to(mesh.device)
        self.run = again_in_backward if recompute == "selective" else kept

    def forward(self, columns: Float[Tensor, "seq rows width"], documents: Context) -> Float[Tensor, "seq rows width"]:
        qkv = self.qkv(columns)
        return self.out(join_heads(self.run(self._attend, qkv, documents)))

    def _attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], documents: Context
    ) -> Float[Tensor, "rows seq heads_local head_dim"]:
        query, key, value = split_heads(qkv, self.section)
        return attention(query, key, value, scale=self.scale, slopes=self.slopes, documents=documents)


class BTLMDecoder(Decoder):
    def context(self, documents: Int32[Tensor, "rows seq"]) -> Context:
        return documents if self.section.document_masking else None


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
