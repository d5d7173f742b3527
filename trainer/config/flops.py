"""What a model costs, from its config section alone: parameters and floating-point operations.

Pure arithmetic on true (unpadded) sizes, shared by all who report or plan, so that no number has two
formulas. Two conventions meet in FLOPs: most published MFU counts every query against every key, although a
causal model needs half of that. Both are offered; whoever prints one says which.
"""

from __future__ import annotations

from tandem.trainer.config import BTLM, PADDING_MULTIPLE, StableLM


def padded(size: int, tp_size: int) -> int:
    """`size` rounded up so that each of `tp_size` ranks holds a multiple of PADDING_MULTIPLE."""
    multiple = PADDING_MULTIPLE * tp_size
    return -(-size // multiple) * multiple


def parameters(model: StableLM | BTLM) -> int:
    """Number of unique parameters: a tied head counts once, and tensors copied to several ranks count once.

    Note: the model cards of Stable LM 2 count norms in another way; configs/README.md works it out.
    """
    return sum(parameters_by_part(model).values())


def parameters_by_part(model: StableLM | BTLM) -> dict[str, int]:
    """Unique parameters by part; together they are the whole model."""
    norms, norm_vectors = _norm_sizes(model)
    return {
        "embedding": model.vocab * model.width,
        "attention": model.depth * _attention_matrices(model),
        "ffn": model.depth * _ffn_matrices(model),
        "norms": norms * model.width * norm_vectors + model.depth * _qk_norm_weights(model),
        "biases": model.depth * _layer_biases(model),
        "head": 0 if model.tied_head else model.vocab * model.width,
    }


def flops_per_token(model: StableLM | BTLM, seq_len: int, causal: bool) -> int:
    """Floating-point operations of forward and backward for one token, recomputation not counted.

    6 per weight of a matrix product (the head is one also where it is tied) and 12 * depth * width * seq_len
    for attention over the whole row, half of it with `causal`. Document masks, norms and biases do not count.
    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    matrices = model.depth * (_attention_matrices(model) + _ffn_matrices(model)) + model.vocab * model.width
    attention = 12 * model.depth * model.width * seq_len
    return 6 * matrices + (attention // 2 if causal else attention)


def _attention_matrices(model: StableLM | BTLM) -> int:
    return _qkv_rows(model) * model.width + model.width * model.width


def _ffn_matrices(model: StableLM | BTLM) -> int:
    return 3 * model.width * model.ffn_width


def _qkv_rows(model: StableLM | BTLM) -> int:
    return (model.heads + 2 * model.kv_heads) * model.head_dim


def _qk_norm_weights(model: StableLM | BTLM) -> int:
    qk_norm = isinstance(model, StableLM) and model.qk_norm
    return (model.heads + model.kv_heads) * model.head_dim if qk_norm else 0


def _norm_sizes(model: StableLM | BTLM) -> tuple[int, int]:
    """Number of norms over the width, and of vectors in each (weight, bias)."""
    if isinstance(model, BTLM):
        return 2 * model.depth + 1, 2
    return (1 if model.parallel_residual else 2) * model.depth + 1, 2 if model.norm_bias else 1


def _layer_biases(model: StableLM | BTLM) -> int:
    """Biases of one layer's matrices; those of norms are counted with the norms."""
    if isinstance(model, BTLM):
        return _qkv_rows(model) + model.width + 2 * model.ffn_width + model.width
    return _qkv_rows(model) if model.qkv_bias else 0
