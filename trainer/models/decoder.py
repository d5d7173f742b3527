"""What both families share: feed-forward network, attention's projections, sequential layer, and the decoder around them.

Layout: the residual stream is [seq, rows, hidden_size], as in Megatron's layers. Only between `tandem.kernels.qkv` and
`merge_heads` are heads a dim: [rows, seq, num_heads_local, head_dim].
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from tandem.kernels.documents import document_starts
from tandem.kernels.swiglu import swiglu, swiglu_linear
from tandem.trainer.config import AnyModelConfig
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
from tandem.trainer.distributed.sharding import TensorSharding
from tandem.trainer.models.kv_cache import KVCache
from tandem.trainer.models.mup import ForwardScales

RecomputeMode = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), as this rank's partial sum without the output bias. One projection computes gate and up."""

    def __init__(
        self, config: AnyModelConfig, mesh: Mesh, dtype: torch.dtype, *, bias: bool, recompute: RecomputeMode
    ) -> None:
        super().__init__()
        padded_ffn_size = padded_size(config.ffn_hidden_size, mesh.tp_size)
        shape = (2, config.ffn_hidden_size, config.hidden_size)
        self.gate_up = ColumnParallel(TensorSharding(shape, 1, padded_ffn_size), mesh, dtype, bias=bias)
        self.down = RowParallel((config.hidden_size, config.ffn_hidden_size), padded_ffn_size, mesh, dtype, bias=bias)
        self.recomputes_swiglu = recompute == "selective"

    def forward(self, hidden_states: Float[Tensor, "seq rows hidden_size"]) -> Float[Tensor, "seq rows hidden_size"]:
        gate_up = self.gate_up(hidden_states).unflatten(-1, (2, -1))
        if self.recomputes_swiglu:
            return swiglu_linear(gate_up, self.down.weight)
        return self.down(swiglu(gate_up))


def build_qkv_projection(config: AnyModelConfig, mesh: Mesh, dtype: torch.dtype, *, bias: bool) -> ColumnParallel:
    """Build one projection to queries, keys and values, grouped by key head so that each rank has whole groups."""
    group = config.num_heads // config.num_kv_heads + 2
    size = config.num_kv_heads * group * config.head_dim
    return ColumnParallel(TensorSharding((size, config.hidden_size), 0, size), mesh, dtype, bias=bias)


def merge_heads(heads: Float[Tensor, "rows seq num_heads_local head_dim"]) -> Float[Tensor, "seq rows width_local"]:
    """Convert heads to the layout of the residual stream."""
    return heads.flatten(2).transpose(0, 1).contiguous()


def add_residual(
    hidden_states: Float[Tensor, "seq rows hidden_size"], partial_sum: Float[Tensor, "seq rows hidden_size"],
    bias: Tensor | None,
) -> Float[Tensor, "seq rows hidden_size"]:  # fmt: skip
    """Add the sum of all ranks' partial sums and the output bias to the residual stream, with one all-reduce."""
    update = reduce_from_tp(partial_sum)  # in fp32 if there are several ranks
    return (hidden_states + (update if bias is None else update + bias)).to(hidden_states.dtype)


class PartialAttention(nn.Module):
    """Attention as this rank's partial sum. The layer adds the bias of `out` after the all-reduce.

    A family builds the projections and implements `attend`.
    """

    qkv: ColumnParallel
    out: RowParallel
    maybe_checkpoint: Callable[..., Any]

    def forward(
        self, hidden_states: Float[Tensor, "seq rows hidden_size"], context: Any
    ) -> Float[Tensor, "seq rows hidden_size"]:
        return self.out(merge_heads(self.maybe_checkpoint(self.attend, self.qkv(hidden_states), context)))

    def attend(
        self, qkv: Float[Tensor, "seq rows qkv_local"], context: Any
    ) -> Float[Tensor, "rows seq num_heads_local head_dim"]:
        raise NotImplementedError


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
    """Embedding, layers, final norm and head, without initial values.

    A family implements `build_norm`, `build_layer` and `layer_context`.
    """

    config: AnyModelConfig

    def __init__(
        self, config: AnyModelConfig, scales: ForwardScales, mesh: Mesh, dtype: torch.dtype, recompute: RecomputeMode
    ) -> None:
        super().__init__()
        self.config, self.scales, self.mesh = config, scales, mesh
        shape = config.vocab_size, config.hidden_size
        self.embedding = VocabParallel(*shape, mesh, dtype)
        self.layers = nn.ModuleList(self.build_layer(dtype, recompute) for _ in range(config.num_layers))
        self.final_norm = self.build_norm(dtype)
        self.head = None
        if not config.tie_word_embeddings:
            size = padded_size(config.vocab_size, mesh.tp_size)
            self.head = ColumnParallel(TensorSharding(shape, 0, size), mesh, dtype, bias=False, role="head")
        self.maybe_checkpoint = activation_checkpoint if recompute == "full" else call_directly

    def build_norm(self, dtype: torch.dtype) -> LayerNorm:
        raise NotImplementedError

    def build_layer(self, dtype: torch.dtype, recompute: RecomputeMode) -> nn.Module:
        raise NotImplementedError

    def layer_context(self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None) -> Any:
        """Return what every layer reads besides the residual stream, such as positions and document boundaries."""
        raise NotImplementedError

    def document_starts(
        self, document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache | None
    ) -> Int32[Tensor, "rows keys"] | None:
        """Return the start of each key's document, or None if attention may cross all documents of a row."""
        if kv_cache is None:
            return document_starts(document_ids) if self.config.document_masking else None
        if not kv_cache.has_multiple_documents:
            return None
        # Without document masking, all texts are document 0, but padding is still masked.
        document_ids = kv_cache.document_ids
        return document_starts(document_ids if self.config.document_masking else document_ids.clamp(max=0))

    def forward(
        self, tokens: Int64[Tensor, "rows seq"], targets: Int64[Tensor, "rows seq"], document_ids: Int32[Tensor, "rows seq"]
    ) -> Float32[Tensor, "rows seq"]:  # fmt: skip
        """Return the cross-entropy of each target in nats, the same on every tensor-parallel rank."""
        hidden_states, weight = self._logit_factors(tokens, self.layer_context(document_ids, None))
        vocab_size, scale = self.config.vocab_size, self.scales.logits
        return parallel_cross_entropy(
            hidden_states, weight, targets.t(), vocab_size=vocab_size, scale=scale, mesh=self.mesh
        ).t()

    @torch.no_grad()
    def logits(
        self, tokens: Int64[Tensor, "rows seq"], document_ids: Int32[Tensor, "rows seq"]
    ) -> Float32[Tensor, "rows seq vocab"]:
        """Return the logits of the vocabulary without padding, on every rank."""
        logits = gather_from_tp(self._logits_local(tokens, self.layer_context(document_ids, None)))
        return logits[..., : self.config.vocab_size].transpose(0, 1)

    @torch.no_grad()
    def next_token_logits(
        self, tokens: Int64[Tensor, "rows seq"], document_ids: Int32[Tensor, "rows seq"], kv_cache: KVCache
    ) -> Float32[Tensor, "rows vocab"]:
        """Append the tokens to the cache, and return the logits of the next token on every rank.

        The result equals `logits` of all cached tokens, each row without its padding (negative document ids before the first
        token). Note: This does not hold with dynamic position interpolation, because the divisor grows with the row but the
        keys and values in the cache do not change.
        """
        kv_cache.append_document_ids(document_ids)
        logits = gather_from_tp(self._logits_local(tokens, self.layer_context(document_ids, kv_cache), num_last=1))
        return logits[0, :, : self.config.vocab_size]

    def _logits_local(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, num_last: int = 0
    ) -> Float32[Tensor, "positions rows vocab_local"]:
        """Return the logits of the last `num_last` positions, or of all if it is 0."""
        return nn.functional.linear(*self._logit_factors(tokens, context, num_last)).float() * self.scales.logits

    def _logit_factors(
        self, tokens: Int64[Tensor, "rows seq"], context: Any, num_last: int = 0
    ) -> tuple[Float[Tensor, "positions rows hidden_size"], Float[Tensor, "vocab_local hidden_size"]]:
        """Return the hidden states of the last `num_last` positions (0: all) and the head, whose product is the logits."""
        hidden_states = self.embedding(tokens.t().contiguous()) * self.scales.embedding
        for layer in self.layers:
            hidden_states = self.maybe_checkpoint(layer, hidden_states, context)
        normalized = copy_to_tp(self.final_norm(hidden_states[-num_last:]))
        return normalized, self.embedding.weight if self.head is None else self.head.weight
