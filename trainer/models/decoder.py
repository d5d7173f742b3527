"""What both families share: the gated feed-forward network, the fused projection to heads, the decoder around the layers.

The one layout decision: the residual stream is [seq, rows, width], the order Megatron's layers work in; heads appear as
[rows, seq, heads_local, head_dim] only between `tandem.kernels.qkv` and `merge_heads`.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from tandem.kernels.documents import document_starts
from tandem.kernels.swiglu import swiglu, swiglu_linear
from tandem.trainer.config import BTLMConfig, StableLMConfig
from tandem.trainer.config.padding import padded_size
from tandem.trainer.distributed.layers import (
    ColumnParallel,
    LayerNorm,
    RowParallel,
    VocabParallel,
    copy_to_tp,
    gather_from_tp,
    reduce_from_tp,
)
from tandem.trainer.distributed.loss import parallel_cross_entropy
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.recompute import activation_checkpoint, call_directly
from tandem.trainer.models.kv_cache import KVCache
from tandem.trainer.models.mup import ForwardScales

RecomputeMode = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection; returns this rank's partial sum, without the output bias."""

    def __init__(
        self,
        config: StableLMConfig | BTLMConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        bias: bool,
        recompute: RecomputeMode,
    ) -> None:
        super().__init__()
        padded_ffn_size = padded_size(config.ffn_hidden_size, mesh.tp_size)
        shape = (2, config.ffn_hidden_size, config.hidden_size)
        self.gate_up = ColumnParallel(shape, 1, padded_ffn_size, mesh, dtype, bias=bias)
        self.down = RowParallel((config.hidden_size, config.ffn_hidden_size), padded_ffn_size, mesh, dtype, bias=bias)
        self.recomputes_swiglu = recompute == "selective"

    def forward(self, hidden_states: Float[Tensor, "seq rows hidden_size"]) -> Float[Tensor, "seq rows hidden_size"]:
        gate_up = self.gate_up(hidden_states).unflatten(-1, (2, -1))
        if self.recomputes_swiglu:
            return swiglu_linear(gate_up, self.down.weight)
        return self.down(swiglu(gate_up))


def build_qkv_projection(
    config: StableLMConfig | BTLMConfig, mesh: Mesh, dtype: torch.dtype, *, bias: bool
) -> ColumnParallel:
    """One projection to queries, keys and values, grouped by key head, so that a rank's share is a run of whole groups."""
    group = config.num_heads // config.num_kv_heads + 2
    size = config.num_kv_heads * group * config.head_dim
    return ColumnParallel((size, config.hidden_size), 0, size, mesh, dtype, bias=bias)


def merge_heads(heads: Float[Tensor, "rows seq num_heads_local head_dim"]) -> Float[Tensor, "seq rows width_local"]:
    """Back to the residual stream's layout."""
    return heads.flatten(2).transpose(0, 1).contiguous()


def add_residual(
    hidden_states: Float[Tensor, "seq rows hidden_size"],
    partial_sum: Float[Tensor, "seq rows hidden_size"],
    bias: Tensor | None,
) -> Float[Tensor, "seq rows hidden_size"]:
    """stream plus the sum of all ranks' partial sums plus the output bias: one all-reduce."""
    update = reduce_from_tp(partial_sum)  # of several ranks in fp32 still
    return (hidden_states + (update if bias is None else update + bias)).to(hidden_states.dtype)


class PartialAttention(nn.Module):
    """What a layer needs of its family's attention: this rank's partial sum, and the projection whose bias is added after."""

    out: RowParallel


class SequentialLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, attention: PartialAttention, ffn: FeedForward, norms: tuple[LayerNorm, LayerNorm]) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norms
        self.attention, self.ffn = attention, ffn

    def forward(
        self, hidden_states: Float[Tensor, "seq rows hidden_size"], context: Any
    ) -> Float[Tensor, "seq rows hidden_size"]:
        partial_sum = self.attention(copy_to_tp(self.attention_norm(hidden_states)), context)
        hidden_states = add_residual(hidden_states, partial_sum, self.attention.out.bias)
        partial_sum = self.ffn(copy_to_tp(self.ffn_norm(hidden_states)))
        return add_residual(hidden_states, partial_sum, self.ffn.down.bias)


class Decoder(nn.Module):
    """Embedding, layers, final norm, head. A family adds its layers and its `layer_context`: what all its layers read
    besides x.
    """

    config: StableLMConfig | BTLMConfig

    def __init__(
        self, config: StableLMConfig | BTLMConfig, scales: ForwardScales, layers: list[nn.Module], final_norm: LayerNorm,
        mesh: Mesh, dtype: torch.dtype, *, recompute: RecomputeMode,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.scales, self.mesh = config, scales, mesh
        self.embedding = VocabParallel(config.vocab_size, config.hidden_size, mesh, dtype)
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self.head = None
        if not config.tie_word_embeddings:
            size = padded_size(config.vocab_size, mesh.tp_size)
            self.head = ColumnParallel(
                (config.vocab_size, config.hidden_size), 0, size, mesh, dtype, bias=False, role="head"
            )
        self.maybe_checkpoint = activation_checkpoint if recompute == "full" else call_directly

    def layer_context(self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None) -> Any:
        """What every layer of the family reads besides the stream; `document_ids` are of the tokens in the stream."""
        raise NotImplementedError

    def document_starts(
        self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None
    ) -> Int32[Tensor, "rows keys"] | None:
        """Where the document of every key starts if attention stays within them; None where all tokens of a row are one."""
        if kv_cache is None:
            return document_starts(document_ids) if self.config.document_masking else None
        if not kv_cache.has_multiple_documents:
            return None
        # Padding stays apart from text even where texts do not stay apart from one another.
        return document_starts(
            kv_cache.document_ids if self.config.document_masking else kv_cache.document_ids.clamp(max=0)
        )

    def forward(
        self,
        tokens: Int64[Tensor, "rows seq"],
        targets: Int64[Tensor, "rows seq"],
        document_ids: Int32[Tensor, "rows seq"],
    ) -> Float32[Tensor, "rows seq"]:
        """Cross-entropy of each target in nats; the same on every tensor-parallel rank."""
        hidden_states, weight = self._logit_factors(tokens, self.layer_context(document_ids, None))
        losses = parallel_cross_entropy(
            hidden_states,
            weight,
            targets.t(),
            vocab_size=self.config.vocab_size,
            scale=self.scales.logits,
            mesh=self.mesh,
        )
        return losses.t()

    @torch.no_grad()
    def logits(
        self, tokens: Int64[Tensor, "rows seq"], document_ids: Int32[Tensor, "rows seq"]
    ) -> Float32[Tensor, "rows seq vocab"]:
        """Logits of the true vocabulary on every rank."""
        logits = gather_from_tp(self._logits_local(tokens, self.layer_context(document_ids, None)))
        return logits[..., : self.config.vocab_size].transpose(0, 1)

    @torch.no_grad()
    def next_token_logits(
        self, tokens: Int64[Tensor, "rows seq"], document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache
    ) -> Float32[Tensor, "rows vocab"]:
        """Logits of what follows the last of the tokens, on every rank; the cache holds them behind those it held.

        The logits are those of `logits` for all tokens together, each row without its padding (negative documents,
        before the first token). Note: not so with dynamic position interpolation, whose divisor grows with the row
        while keys and values stay as they were made.
        """
        kv_cache.append_document_ids(document_ids)
        logits = gather_from_tp(self._logits_local(tokens, self.layer_context(document_ids, kv_cache), num_last=1))
        return logits[0, :, : self.config.vocab_size]

    def _logits_local(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, num_last: int = 0
    ) -> Float32[Tensor, "positions rows vocab_local"]:
        """At the last so many positions; 0: at all."""
        return nn.functional.linear(*self._logit_factors(tokens, context, num_last)).float() * self.scales.logits

    def _logit_factors(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, num_last: int = 0
    ) -> tuple[Float[Tensor, "positions rows hidden_size"], Float[Tensor, "vocab_local hidden_size"]]:
        """Logits are the product of these, at the last so many positions, 0: at all. A tied matrix is the embedding's."""
        hidden_states = self.embedding(tokens.t().contiguous()) * self.scales.embedding
        for layer in self.layers:
            hidden_states = self.maybe_checkpoint(layer, hidden_states, context)
        normalized = copy_to_tp(self.final_norm(hidden_states[-num_last:]))
        return normalized, self.embedding.weight if self.head is None else self.head.weight
