"""What a model costs, from its config section alone: parameters and floating-point operations.

Pure arithmetic on true (unpadded) sizes, shared by all who report or plan, so that no number has two
formulas. Two conventions meet in FLOPs: most published MFU counts every query against every key, although a
causal model needs half of that. Both are offered; whoever prints one says which.
"""

from __future__ import annotations

from tandem.trainer.config import BTLMConfig, StableLMConfig


def num_parameters(model: StableLMConfig | BTLMConfig) -> int:
    """Number of unique parameters: a tied head counts once, and tensors copied to several ranks count once.

    Note: the model cards of Stable LM 2 count norms in another way; configs/README.md works it out.
    """
    return sum(num_parameters_by_part(model).values())


def num_parameters_by_part(model: StableLMConfig | BTLMConfig) -> dict[str, int]:
    """Unique parameters by part; together they are the whole model."""
    num_norms, num_norm_vectors = _norm_counts(model)
    return {
        "embedding": model.vocab_size * model.hidden_size,
        "attention": model.num_layers * _num_attention_weights(model),
        "ffn": model.num_layers * _num_ffn_weights(model),
        "norms": num_norms * model.hidden_size * num_norm_vectors + model.num_layers * _num_qk_layernorm_weights(model),
        "biases": model.num_layers * _num_layer_biases(model),
        "head": 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size,
    }


def flops_per_token(model: StableLMConfig | BTLMConfig, seq_len: int, causal: bool) -> int:
    """Floating-point operations of forward and backward for one token, recomputation not counted.

    6 per weight of a matrix product (the head is one also where it is tied) and 12 * depth * width * seq_len
    for attention over the whole row, half of it with `causal`. Document masks, norms and biases do not count.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    num_matrix_weights = (
        model.num_layers * (_num_attention_weights(model) + _num_ffn_weights(model))
        + model.vocab_size * model.hidden_size
    )
    attention_flops = 12 * model.num_layers * model.hidden_size * seq_len
    return 6 * num_matrix_weights + (attention_flops // 2 if causal else attention_flops)


def _num_attention_weights(model: StableLMConfig | BTLMConfig) -> int:
    return _qkv_projection_size(model) * model.hidden_size + model.hidden_size * model.hidden_size


def _num_ffn_weights(model: StableLMConfig | BTLMConfig) -> int:
    return 3 * model.hidden_size * model.ffn_hidden_size


def _qkv_projection_size(model: StableLMConfig | BTLMConfig) -> int:
    return (model.num_heads + 2 * model.num_kv_heads) * model.head_dim


def _num_qk_layernorm_weights(model: StableLMConfig | BTLMConfig) -> int:
    has_qk_layernorm = isinstance(model, StableLMConfig) and model.qk_layernorm
    return (model.num_heads + model.num_kv_heads) * model.head_dim if has_qk_layernorm else 0


def _norm_counts(model: StableLMConfig | BTLMConfig) -> tuple[int, int]:
    """Number of norms over the width, and of vectors in each (weight, bias)."""
    if isinstance(model, BTLMConfig):
        return 2 * model.num_layers + 1, 2
    return (1 if model.parallel_residual else 2) * model.num_layers + 1, 2 if model.norm_bias else 1


def _num_layer_biases(model: StableLMConfig | BTLMConfig) -> int:
    """Biases of one layer's matrices; those of norms are counted with the norms."""
    if isinstance(model, BTLMConfig):
        return _qkv_projection_size(model) + model.hidden_size + 2 * model.ffn_hidden_size + model.hidden_size
    return _qkv_projection_size(model) if model.qkv_bias else 0
