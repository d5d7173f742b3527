"""What both families share: the gated feed-forward network, the fused projection to heads, the decoder around the layers.

The one layout decision: the residual stream is [seq, rows, width], the order Megatron's layers work in; heads appear as
[rows, seq, heads_local, head_dim] only between `tandem.kernels.qkv` and `join_heads`.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from tandem.kernels.documents import starts
from tandem.kernels.swiglu import swiglu, swiglu_linear
from tandem.trainer.config import BTLM, StableLM
from tandem.trainer.config.flops import padded
from tandem.trainer.distributed.layers import Column, Embedding, LayerNorm, Row, from_rows, gathered, to_columns
from tandem.trainer.distributed.loss import cross_entropy
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.recompute import again_in_backward, kept
from tandem.trainer.models.kv_cache import Cache
from tandem.trainer.models.mup import ForwardScales

Recompute = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection; returns this rank's partial sum, without the output bias."""

    def __init__(
        self, section: StableLM | BTLM, mesh: Mesh, dtype: torch.dtype, *, bias: bool, recompute: Recompute
    ) -> None:
        super().__init__()
        size = padded(section.ffn_width, mesh.tp_size)
        shape = (2, section.ffn_width, section.width)
        self.gate_up = Column(shape, 1, size, mesh, dtype, bias=bias)
        self.down = Row((section.width, section.ffn_width), size, mesh, dtype, bias=bias)
        self.recompute_product = recompute == "selective"

    def forward(self, columns: Float[Tensor, "seq rows width"]) -> Float[Tensor, "seq rows width"]:
        gate_up = self.gate_up(columns).unflatten(-1, (2, -1))
        if self.recompute_product:
            return swiglu_linear(gate_up, self.down.weight)
        return self.down(swiglu(gate_up))


def qkv_projection(section: StableLM | BTLM, mesh: Mesh, dtype: torch.dtype, *, bias: bool) -> Column:
    """One projection to queries, keys and values, grouped by key head, so that a rank's share is a run of whole groups."""
    group = section.heads // section.kv_heads + 2
    size = section.kv_heads * group * section.head_dim
    return Column((size, section.width), 0, size, mesh, dtype, bias=bias)


def join_heads(heads: Float[Tensor, "rows seq heads_local head_dim"]) -> Float[Tensor, "seq rows width_local"]:
    """Back to the residual stream's layout."""
    return heads.flatten(2).transpose(0, 1).contiguous()


def residual(
    stream: Float[Tensor, "seq rows width"], partial: Float[Tensor, "seq rows width"], bias: Tensor | None
) -> Float[Tensor, "seq rows width"]:
    """stream plus the sum of all ranks' partial sums plus the output bias: one all-reduce."""
    update = from_rows(partial)  # of several ranks in fp32 still
    return (stream + (update if bias is None else update + bias)).to(stream.dtype)


class PartialAttention(nn.Module):
    """What a layer needs of its family's attention: this rank's partial sum, and the projection whose bias is added after."""

    out: Row


class SequentialLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, attention: PartialAttention, ffn: FeedForward, norms: tuple[LayerNorm, LayerNorm]) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norms
        self.attention, self.ffn = attention, ffn

    def forward(self, stream: Float[Tensor, "seq rows width"], context: Any) -> Float[Tensor, "seq rows width"]:
        partial = self.attention(to_columns(self.attention_norm(stream)), context)
        stream = residual(stream, partial, self.attention.out.bias)
        partial = self.ffn(to_columns(self.ffn_norm(stream)))
        return residual(stream, partial, self.ffn.down.bias)


class Decoder(nn.Module):
    """Embedding, layers, final norm, head. A family adds its layers and its `context`: what all its layers read besides x."""

    section: StableLM | BTLM

    def __init__(
        self, section: StableLM | BTLM, scales: ForwardScales, layers: list[nn.Module], final_norm: LayerNorm,
        mesh: Mesh, dtype: torch.dtype, *, recompute: Recompute,
    ) -> None:  # fmt: skip
        super().__init__()
        self.section, self.scales, self.mesh = section, scales, mesh
        self.embedding = Embedding(section.vocab, section.width, mesh, dtype)
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self.head = None
        if not section.tied_head:
            size = padded(section.vocab, mesh.tp_size)
            self.head = Column((section.vocab, section.width), 0, size, mesh, dtype, bias=False, role="head")
        self.run = again_in_backward if recompute == "full" else kept

    def context(self, documents: Int32[Tensor, "rows seq"], cache: Cache | None) -> Any:
        """What every layer of the family reads besides the stream; `documents` are of the tokens in the stream."""
        raise NotImplementedError

    def apart(self, documents: Int32[Tensor, "rows seq"], cache: Cache | None) -> Int32[Tensor, "rows keys"] | None:
        """Where the document of every key starts if attention stays within them; None where all tokens of a row are one."""
        if cache is None:
            return starts(documents) if self.section.document_masking else None
        if not cache.mixed:
            return None
        # Padding stays apart from text even where texts do not stay apart from one another.
        return starts(cache.documents if self.section.document_masking else cache.documents.clamp(max=0))

    def forward(
        self,
        tokens: Int64[Tensor, "rows seq"],
        targets: Int64[Tensor, "rows seq"],
        documents: Int32[Tensor, "rows seq"],
    ) -> Float32[Tensor, "rows seq"]:
        """Cross-entropy of each target in nats; the same on every tensor-parallel rank."""
        columns, weight = self._last_factors(tokens, self.context(documents, None))
        losses = cross_entropy(
            columns, weight, targets.t(), vocab=self.section.vocab, scale=self.scales.logits, mesh=self.mesh
        )
        return losses.t()

    @torch.no_grad()
    def logits(
        self, tokens: Int64[Tensor, "rows seq"], documents: Int32[Tensor, "rows seq"]
    ) -> Float32[Tensor, "rows seq vocab"]:
        """Logits of the true vocabulary on every rank."""
        logits = gathered(self._logits_local(tokens, self.context(documents, None)))
        return logits[..., : self.section.vocab].transpose(0, 1)

    @torch.no_grad()
    def read(
        self, tokens: Int64[Tensor, "rows seq"], documents: Int32[Tensor, "rows seq"], cache: Cache
    ) -> Float32[Tensor, "rows vocab"]:
        """Logits of what follows the last of the tokens, on every rank; the cache holds them behind those it held.

        The logits are those of `logits` for all tokens together, each row without its padding (negative documents,
        before the first token). Note: not so with dynamic position interpolation, whose divisor grows with the row
        while keys and values stay as they were made.
        """
        cache.begin(documents)
        logits = gathered(self._logits_local(tokens, self.context(documents, cache), last=1))
        return logits[0, :, : self.section.vocab]

    def _logits_local(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, last: int = 0
    ) -> Float32[Tensor, "positions rows vocab_local"]:
        """At the last so many positions; 0: at all."""
        return nn.functional.linear(*self._last_factors(tokens, context, last)).float() * self.scales.logits

    def _last_factors(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, last: int = 0
    ) -> tuple[Float[Tensor, "positions rows width"], Float[Tensor, "vocab_local width"]]:
        """Logits are the product of these, at the last so many positions, 0: at all. A tied matrix is the embedding's."""
        stream = self.embedding(tokens.t().contiguous()) * self.scales.embedding
        for layer in self.layers:
            stream = self.run(layer, stream, context)
        columns = to_columns(self.final_norm(stream[-last:]))
        return columns, self.embedding.weight if self.head is None else self.head.weight
