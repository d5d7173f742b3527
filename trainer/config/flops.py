"""Count the parameters and FLOPs of a model from its config section, with unpadded sizes.

All reports and plans use these formulas. Most published MFU counts attention of every query to every key, although a causal
model needs half of that. `flops_per_token` offers both; a caller that prints one must name the convention.
"""

from __future__ import annotations

from tandem.trainer.config import AnyModelConfig, BTLMConfig


def num_parameters(model: AnyModelConfig) -> int:
    """Count unique parameters: a tied head and a tensor replicated on several ranks count once.

    Note: the model cards of Stable LM 2 count norms differently; configs/README.md explains how.
    """
    return sum(num_parameters_by_part(model).values())


def num_parameters_by_part(model: AnyModelConfig) -> dict[str, int]:
    """Count unique parameters by part of the model. The biases of norms count as norms."""
    hidden_size, ffn_hidden_size, num_layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    head_norm_weights = 0
    if isinstance(model, BTLMConfig):
        norms_per_layer, vectors_per_norm = 2, 2
        layer_biases = qkv_size + hidden_size + 2 * ffn_hidden_size + hidden_size
    else:
        norms_per_layer, vectors_per_norm = 1 if model.parallel_residual else 2, 2 if model.norm_bias else 1
        layer_biases = qkv_size if model.qkv_bias else 0
        if model.qk_layernorm:
            head_norm_weights = (model.num_heads + model.num_kv_heads) * model.head_dim
    num_norms = norms_per_layer * num_layers + 1
    return {
        "embedding": model.vocab_size * hidden_size,
        "attention": num_layers * (qkv_size + hidden_size) * hidden_size,
        "ffn": num_layers * 3 * hidden_size * ffn_hidden_size,
        "norms": num_norms * vectors_per_norm * hidden_size + num_layers * head_norm_weights,
        "biases": num_layers * layer_biases,
        "head": 0 if model.tie_word_embeddings else model.vocab_size * hidden_size,
    }


def flops_per_token(model: AnyModelConfig, seq_len: int, causal: bool) -> int:
    """Count the FLOPs of forward and backward for one token, without recomputation.

    6 per weight of a matrix product (a tied head counts too), plus 12 * num_layers * hidden_size * seq_len for attention over
    the whole row, or half of that if `causal`. Ignores document masks, norms and biases.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    parts = num_parameters_by_part(model)
    num_matrix_weights = (
        parts["attention"] + parts["ffn"] + parts["embedding"]
    )  # the head has the size of the embedding
    attention_flops = 12 * model.num_layers * model.hidden_size * seq_len
    return 6 * num_matrix_weights + (attention_flops // 2 if causal else attention_flops)
