"""Count the parameters and FLOPs of a model from its config section, with unpadded sizes.

All reports and plans use these formulas. Most published MFU counts attention of every query to every key, although a causal
model needs half of that. `flops_per_token` offers both; a caller that prints one must name the convention.
"""

from __future__ import annotations

from tandem.trainer.config import AnyModelConfig, BTLMConfig, StableLMConfig


def num_parameters(model: AnyModelConfig) -> int:
    """Count unique parameters: a tied head and a tensor replicated on several ranks count once.

    Note: the model cards of Stable LM 2 count norms differently; configs/README.md explains how.
    """
    return sum(num_parameters_by_part(model).values())


def num_parameters_by_part(model: AnyModelConfig) -> dict[str, int]:
    """Count unique parameters by part of the model."""
    num_norms, num_norm_vectors = _norm_counts(model)
    return {
        "embedding": model.vocab_size * model.hidden_size,
        "attention": model.num_layers * _num_attention_weights(model),
        "ffn": model.num_layers * _num_ffn_weights(model),
        "norms": num_norms * model.hidden_size * num_norm_vectors + model.num_layers * _num_qk_layernorm_weights(model),
        "biases": model.num_layers * _num_layer_biases(model),
        "head": 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size,
    }


def flops_per_token(model: AnyModelConfig, seq_len: int, causal: bool) -> int:
    """Count the FLOPs of forward and backward for one token, without recomputation.

    6 per weight of a matrix product (a tied head counts too), plus 12 * num_layers * hidden_size * seq_len for attention over
    the whole row, or half of that if `causal`. Ignores document masks, norms and biases.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    layer_weights = _num_attention_weights(model) + _num_ffn_weights(model)
    num_matrix_weights = model.num_layers * layer_weights + model.vocab_size * model.hidden_size
    attention_flops = 12 * model.num_layers * model.hidden_size * seq_len
    return 6 * num_matrix_weights + (attention_flops // 2 if causal else attention_flops)


def _num_attention_weights(model: AnyModelConfig) -> int:
    return _qkv_projection_size(model) * model.hidden_size + model.hidden_size * model.hidden_size


def _num_ffn_weights(model: AnyModelConfig) -> int:
    return 3 * model.hidden_size * model.ffn_hidden_size


def _qkv_projection_size(model: AnyModelConfig) -> int:
    return (model.num_heads + 2 * model.num_kv_heads) * model.head_dim


def _num_qk_layernorm_weights(model: AnyModelConfig) -> int:
    has_qk_layernorm = isinstance(model, StableLMConfig) and model.qk_layernorm
    return (model.num_heads + model.num_kv_heads) * model.head_dim if has_qk_layernorm else 0


def _norm_counts(model: AnyModelConfig) -> tuple[int, int]:
    """Return the number of norms over hidden_size, and the vectors in each (weight, bias)."""
    if isinstance(model, BTLMConfig):
        return 2 * model.num_layers + 1, 2
    return (1 if model.parallel_residual else 2) * model.num_layers + 1, 2 if model.norm_bias else 1


def _num_layer_biases(model: AnyModelConfig) -> int:
    """Count the biases of one layer's matrices. Those of norms count as norms."""
    if isinstance(model, BTLMConfig):
        return _qkv_projection_size(model) + model.hidden_size + 2 * model.ffn_hidden_size + model.hidden_size
    return _qkv_projection_size(model) if model.qkv_bias else 0
