"""Stable LM 2, written from its published description alone; our tensor names, not the trainer's code.

Parallel or sequential pre-norm blocks, SwiGLU without biases, grouped queries, one LayerNorm per query and
key head before rotation, half-split rotation of the leading part of a head, scores times 1 / sqrt(head_dim).
With `documents` tokens see their own document only and positions restart with it. muP is not published for
this family; if it is given, its three multipliers are those of BTLM.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, silu

from tandem.trainer.config import Mup, StableLM
from tests.reference import shared


def shapes(model: StableLM) -> dict[str, tuple[int, ...]]:
    width, head_dim = model.width, model.width // model.heads
    features = (model.heads + 2 * model.kv_heads) * head_dim
    table: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocab, width)}
    norms = ["final_norm"]
    for index in range(model.depth):
        layer = f"layers.{index}"
        norms += [f"{layer}.attention_norm"] + ([] if model.parallel_residual else [f"{layer}.ffn_norm"])
        table[f"{layer}.attention.qkv.weight"] = (features, width)
        if model.qkv_bias:
            table[f"{layer}.attention.qkv.bias"] = (features,)
        if model.qk_norm:
            table[f"{layer}.attention.query_norm.weight"] = (model.heads, head_dim)
            table[f"{layer}.attention.key_norm.weight"] = (model.kv_heads, head_dim)
        table[f"{layer}.attention.out.weight"] = (width, width)
        table[f"{layer}.ffn.gate_up.weight"] = (2, model.ffn_width, width)
        table[f"{layer}.ffn.down.weight"] = (width, model.ffn_width)
    suffixes = ("weight", "bias") if model.norm_bias else ("weight",)
    table |= {f"{norm}.{suffix}": (width,) for norm in norms for suffix in suffixes}
    return table if model.tied_head else table | {"head.weight": (model.vocab, width)}


def random_tensors(model: StableLM, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model by its global name, at its true shape, none of it zero."""
    return shared.random(shapes(model), seed)


def positions(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """[rows, seq]: the place of each token in its row, or in its document."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if documents is None:
        return place
    start = torch.ones_like(documents, dtype=torch.bool)
    start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(start, place, 0).cummax(dim=1).values


def rotate(x: Tensor, place: Tensor, base: float, rotated: int) -> Tensor:
    """`x` [rows, heads, seq, head_dim]: of the first `rotated` dims, i turns together with i + rotated/2."""
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=x.dtype, device=x.device) / rotated)
    angle = place[:, None, :, None] * frequency
    first, second, rest = x.split([rotated // 2, rotated // 2, x.shape[-1] - rotated], dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest)
    return torch.cat(turned, dim=-1)


def logits(
    read: Callable[[str], Tensor],
    model: StableLM,
    mup: Mup | None,
    tokens: Tensor,
    documents: Tensor | None = None,
) -> Tensor:
    """[rows, seq, vocab] in the dtype of the tensors; differentiable."""
    rows, length = tokens.shape
    head_dim, kv_heads, eps = model.width // model.heads, model.kv_heads, model.norm_epsilon
    group, rotated = model.heads // kv_heads, int(model.rotary_fraction * head_dim)
    place, mask = positions(tokens, documents), shared.seen(tokens, documents)
    scale = 1 / head_dim if mup else 1 / math.sqrt(head_dim)
    stream = embedding(tokens, read("embedding.weight")) * (mup.embedding_multiplier if mup else 1.0)

    def norm(x: Tensor, name: str) -> Tensor:
        bias = read(f"{name}.bias") if model.norm_bias else None
        return layer_norm(x, (model.width,), read(f"{name}.weight"), bias, eps)

    def attention(x: Tensor, name: str) -> Tensor:
        bias = read(f"{name}.qkv.bias") if model.qkv_bias else None
        qkv = linear(x, read(f"{name}.qkv.weight"), bias).view(rows, length, kv_heads, group + 2, head_dim)
        query, key, value = qkv.permute(0, 2, 3, 1, 4).split([group, 1, 1], dim=2)
        query, key, value = (heads.flatten(1, 2) for heads in (query, key, value))
        if model.qk_norm:
            query = layer_norm(query, (head_dim,), eps=eps) * read(f"{name}.query_norm.weight")[:, None]
            key = layer_norm(key, (head_dim,), eps=eps) * read(f"{name}.key_norm.weight")[:, None]
        query, key = (rotate(heads, place, model.rotary_base, rotated) for heads in (query, key))
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
        mixed = shared.attend(query, key, value, scale=scale, bias=0.0, mask=mask)
        return linear(mixed, read(f"{name}.out.weight"))

    def ffn(x: Tensor, name: str) -> Tensor:
        gate, up = read(f"{name}.gate_up.weight")
        return linear(silu(linear(x, gate)) * linear(x, up), read(f"{name}.down.weight"))

    for index in range(model.depth):
        layer = f"layers.{index}"
        x = norm(stream, f"{layer}.attention_norm")
        attended = attention(x, f"{layer}.attention")
        if model.parallel_residual:
            stream = stream + attended + ffn(x, f"{layer}.ffn")
        else:
            stream = stream + attended
            stream = stream + ffn(norm(stream, f"{layer}.ffn_norm"), f"{layer}.ffn")
    head = read("embedding.weight" if model.tied_head else "head.weight")
    factor = mup.output_multiplier / (model.width / mup.base_width) if mup else 1.0
    return linear(norm(stream, "final_norm"), head) * factor
