"""Stable LM 2, written from its published description alone; our tensor names, not the trainer's code.

Parallel or sequential pre-norm blocks, SwiGLU without biases, grouped queries, one LayerNorm per query and
key head before rotation, half-split rotation of the leading part of a head, scores times 1 / sqrt(head_dim).
With `document_ids` tokens see their own document only and positions restart with it. muP is not published for
this family; if it is given, its three multipliers are those of BTLM.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, silu

from tandem.trainer.config import MupConfig, StableLMConfig
from tests.reference import shared


def shapes(model: StableLMConfig) -> dict[str, tuple[int, ...]]:
    width, head_dim = model.hidden_size, model.hidden_size // model.num_heads
    features = (model.num_heads + 2 * model.num_kv_heads) * head_dim
    table: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab_size, width)}
    norms = ["final_norm"]
    for index in range(model.num_layers):
        layer = f"layers.{index}"
        norms += [f"{layer}.attention_norm"] + ([] if model.parallel_residual else [f"{layer}.ffn_norm"])
        table[f"{layer}.attention.qkv.weight"] = (features, width)
        if model.qkv_bias:
            table[f"{layer}.attention.qkv.bias"] = (features,)
        if model.qk_layernorm:
            table[f"{layer}.attention.query_norm.weight"] = (model.num_heads, head_dim)
            table[f"{layer}.attention.key_norm.weight"] = (model.num_kv_heads, head_dim)
        table[f"{layer}.attention.out.weight"] = (width, width)
        table[f"{layer}.ffn.gate_up.weight"] = (2, model.ffn_hidden_size, width)
        table[f"{layer}.ffn.down.weight"] = (width, model.ffn_hidden_size)
    suffixes = ("weight", "bias") if model.norm_bias else ("weight",)
    table |= {f"{norm}.{suffix}": (width,) for norm in norms for suffix in suffixes}
    return table if model.tie_word_embeddings else table | {"head.weight": (model.vocab_size, width)}


def random_tensors(model: StableLMConfig, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model by its global name, at its true shape, none of it zero."""
    return shared.random_tensors(shapes(model), seed)


def positions(tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """[rows, seq]: the place of each token in its row, or in its document."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if document_ids is None:
        return place
    start = torch.ones_like(document_ids, dtype=torch.bool)
    start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(start, place, 0).cummax(dim=1).values


def apply_rotary(x: Tensor, position_ids: Tensor, base: float, rotary_dims: int) -> Tensor:
    """`x` [rows, heads, seq, head_dim]: of the first `rotary_dims` dims, i turns together with i + rotated/2."""
    frequency = base ** (-torch.arange(0, rotary_dims, 2, dtype=x.dtype, device=x.device) / rotary_dims)
    angle = position_ids[:, None, :, None] * frequency
    first, second, rest = x.split([rotary_dims // 2, rotary_dims // 2, x.shape[-1] - rotary_dims], dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest)
    return torch.cat(turned, dim=-1)


def logits(
    get_tensor: Callable[[str], Tensor],
    model: StableLMConfig,
    mup: MupConfig | None,
    tokens: Tensor,
    document_ids: Tensor | None = None,
) -> Tensor:
    """[rows, seq, vocab] in the dtype of the tensors; differentiable."""
    rows, length = tokens.shape
    head_dim, num_kv_heads, eps = model.hidden_size // model.num_heads, model.num_kv_heads, model.norm_eps
    group, rotated = model.num_heads // num_kv_heads, int(model.partial_rotary_factor * head_dim)
    place, mask = positions(tokens, document_ids), shared.attention_mask(tokens, document_ids)
    scale = 1 / head_dim if mup and mup.scale_qk_dot_by_d else 1 / math.sqrt(head_dim)
    hidden = embedding(tokens, get_tensor("embedding.weight")) * (mup.embedding_multiplier if mup else 1.0)

    def norm(x: Tensor, name: str) -> Tensor:
        bias = get_tensor(f"{name}.bias") if model.norm_bias else None
        return layer_norm(x, (model.hidden_size,), get_tensor(f"{name}.weight"), bias, eps)

    def attention(x: Tensor, name: str) -> Tensor:
        bias = get_tensor(f"{name}.qkv.bias") if model.qkv_bias else None
        qkv = linear(x, get_tensor(f"{name}.qkv.weight"), bias).view(rows, length, num_kv_heads, group + 2, head_dim)
        query, key, value = qkv.permute(0, 2, 3, 1, 4).split([group, 1, 1], dim=2)
        query, key, value = (heads.flatten(1, 2) for heads in (query, key, value))
        if model.qk_layernorm:
            query = layer_norm(query, (head_dim,), eps=eps) * get_tensor(f"{name}.query_norm.weight")[:, None]
            key = layer_norm(key, (head_dim,), eps=eps) * get_tensor(f"{name}.key_norm.weight")[:, None]
        query, key = (apply_rotary(heads, place, model.rotary_base, rotated) for heads in (query, key))
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        mixed = shared.attention(query, key, value, scale=scale, bias=0.0, mask=mask)
        return linear(mixed, get_tensor(f"{name}.out.weight"))

    def ffn(x: Tensor, name: str) -> Tensor:
        gate, up = get_tensor(f"{name}.gate_up.weight")
        return linear(silu(linear(x, gate)) * linear(x, up), get_tensor(f"{name}.down.weight"))

    for index in range(model.num_layers):
        layer = f"layers.{index}"
        x = norm(hidden, f"{layer}.attention_norm")
        attended = attention(x, f"{layer}.attention")
        if model.parallel_residual:
            hidden = hidden + attended + ffn(x, f"{layer}.ffn")
        else:
            hidden = hidden + attended
            hidden = hidden + ffn(norm(hidden, f"{layer}.ffn_norm"), f"{layer}.ffn")
    head = get_tensor("embedding.weight" if model.tie_word_embeddings else "head.weight")
    factor = mup.output_multiplier / (model.hidden_size / mup.base_hidden_size) if mup else 1.0
    return linear(norm(hidden, "final_norm"), head) * factor
