"""BTLM, written from its published description alone; our tensor names, not the trainer's code.

Sequential pre-norm blocks, biases everywhere, SwiGLU, ALiBi. With muP: scores times 1 / head_dim (without:
its root), embeddings times a multiplier, logits times output_multiplier / (width / base_hidden_size). The ALiBi
bias is added to the scaled scores as it is; position interpolation divides its distances by a factor, or by
how many times longer than `train_seq_len` the row is. Documents attend across their borders unless
`document_ids` is given.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, silu

from tandem.trainer.config import AlibiScalingConfig, BTLMConfig, MupConfig
from tests.reference import shared


def shapes(model: BTLMConfig) -> dict[str, tuple[int, ...]]:
    width, ffn_hidden_size = model.hidden_size, model.ffn_hidden_size
    table: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab_size, width)}
    for index in range(model.num_layers):
        layer = {
            "attention_norm": (width,),
            "attention.qkv": (3 * width, width),
            "attention.out": (width, width),
            "ffn_norm": (width,),
            "ffn.gate_up": (2, ffn_hidden_size, width),
            "ffn.down": (width, ffn_hidden_size),
        }
        for name, shape in layer.items():
            table[f"layers.{index}.{name}.weight"] = shape
            table[f"layers.{index}.{name}.bias"] = shape if "norm" in name else shape[:-1]
    table |= {"final_norm.weight": (width,), "final_norm.bias": (width,)}
    return table if model.tie_word_embeddings else table | {"head.weight": (model.vocab_size, width)}


def random_tensors(model: BTLMConfig, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model by its global name, at its true shape, none of it zero."""
    return shared.random_tensors(shapes(model), seed)


def slopes(heads: int) -> list[float]:
    """Of Press et al. 2022: for a power of two the series r, r^2, ... that ends at 2^-8; otherwise the series
    of the power below, then the 1st, 3rd, 5th, ... member of the series twice as long."""
    if math.log2(heads).is_integer():
        ratio = 2 ** (-8 / heads)
        return [ratio ** (head + 1) for head in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def distance_divisor(scaling: AlibiScalingConfig | None, length: int) -> float:
    """How many of a row's positions count as one."""
    if scaling is None:
        return 1.0
    return scaling.factor or max(1.0, length / scaling.train_seq_len)


def logits(
    get_tensor: Callable[[str], Tensor],
    model: BTLMConfig,
    mup: MupConfig | None,
    tokens: Tensor,
    document_ids: Tensor | None = None,
) -> Tensor:
    """[rows, seq, vocab] in the dtype of the tensors; differentiable."""
    rows, length = tokens.shape
    heads, head_dim, eps = model.num_heads, model.hidden_size // model.num_heads, model.norm_eps
    position_ids = torch.arange(length, device=tokens.device)
    hidden = embedding(tokens, get_tensor("embedding.weight")) * (mup.embedding_multiplier if mup else 1.0)
    slope = torch.tensor(slopes(heads), dtype=hidden.dtype, device=tokens.device)
    bias = (
        -slope[:, None, None]
        * (position_ids[:, None] - position_ids[None, :]).abs()
        / distance_divisor(model.alibi_scaling, length)
    )
    scale = 1 / head_dim if mup and mup.scale_qk_dot_by_d else 1 / math.sqrt(head_dim)
    mask = shared.attention_mask(tokens, document_ids)

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (model.hidden_size,), get_tensor(f"{name}.weight"), get_tensor(f"{name}.bias"), eps)

    def affine(x: Tensor, name: str) -> Tensor:
        return linear(x, get_tensor(f"{name}.weight"), get_tensor(f"{name}.bias"))

    for index in range(model.num_layers):
        layer = f"layers.{index}"
        qkv = affine(norm(hidden, f"{layer}.attention_norm"), f"{layer}.attention.qkv")
        query, key, value = qkv.view(rows, length, heads, 3, head_dim).permute(3, 0, 2, 1, 4)
        mixed = shared.attention(query, key, value, scale=scale, bias=bias, mask=mask)
        hidden = hidden + affine(mixed, f"{layer}.attention.out")
        x, matrices, biases = (
            norm(hidden, f"{layer}.ffn_norm"),
            *(get_tensor(f"{layer}.ffn.gate_up.{suffix}") for suffix in ("weight", "bias")),
        )
        gate, up = linear(x, matrices[0], biases[0]), linear(x, matrices[1], biases[1])
        hidden = hidden + affine(silu(gate) * up, f"{layer}.ffn.down")
    head = get_tensor("embedding.weight" if model.tie_word_embeddings else "head.weight")
    factor = mup.output_multiplier / (model.hidden_size / mup.base_hidden_size) if mup else 1.0
    return linear(norm(hidden, "final_norm"), head) * factor
