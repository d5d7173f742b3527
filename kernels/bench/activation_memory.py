"""What one token leaves in one layer for backward: ours, plain torch and Liger, counted at real widths without a GPU.

A layer is built from interchangeable operations and run on the meta device, where tensors have sizes and no values. Hooks
count every distinct storage that autograd keeps, for the part of the layer that kept it first: not weights, and not what all
layers read (angles, slopes, where documents begin). Liger's launchers compile as they would for a Hopper GPU and launch
nothing (`tandem.kernels.device.offline_compile`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.attention import attention
from tandem.kernels.bench.shapes import MODELS, Model
from tandem.kernels.device.offline_compile import hopper
from tandem.kernels.layer_norm import layer_norm
from tandem.kernels.qkv import split, split_rotated
from tandem.kernels.swiglu import swiglu, swiglu_linear

TOKENS = 256
"""Bytes per token do not depend on their number, but where scores are written out: those are left to whoever runs that."""
EPSILON = 1e-5


@dataclass(frozen=True)
class Kit:
    """Operations between the matrix products of a layer."""

    norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads: Callable[[Tensor, "Layer"], tuple[Tensor, Tensor, Tensor]]
    """Queries, keys and values, normalised and rotated where the model does that."""
    contract: Callable[[Tensor, Tensor], Tensor]
    """SwiGLU and the product with the matrix behind it."""


@dataclass(frozen=True)
class Layer:
    model: Model
    weights: dict[str, Tensor]
    cos: Tensor
    sin: Tensor
    starts: Tensor
    slopes: Tensor

    @property
    def group(self) -> int:
        return self.model.heads // self.model.kv_heads


def bytes_per_token(model: Model, kit: Kit) -> dict[str, float]:
    """By part of the layer; together they are the layer's. The layer's own input is the first norm's."""
    layer = _layer(model)
    found: dict[int, tuple[str, Tensor]] = {}
    shared = (*layer.weights.values(), layer.cos, layer.sin, layer.starts, layer.slopes)
    apart = {tensor.untyped_storage()._cdata for tensor in shared}
    part = ""

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart:
            # The tensor is held, or a later storage might get the number of one that is gone.
            found.setdefault(storage._cdata, (part, tensor))
        return tensor

    w = layer.weights
    x = torch.empty(TOKENS, 1, model.width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        part = "norm"
        columns = kit.norm(x, w["norm"], w["norm_bias"])
        part = "projection"
        qkv = F.linear(columns, w["qkv"])
        part = "heads"
        query, key, value = kit.heads(qkv, layer)
        part = "attention"
        biases = layer.slopes if model.rotary_dims == 0 else None
        starts = layer.starts if model.documents else None
        mixed = attention(query, key, value, scale=model.attention_scale, slopes=biases, starts=starts)
        mixed = F.linear(mixed.flatten(2).transpose(0, 1), w["out"])
        if model.rotary_dims == 0:  # BTLM's layer is sequential: a second norm
            part = "norm"
            columns = kit.norm(x + mixed, w["norm"], w["norm_bias"])
        part = "feed-forward"
        kit.contract(F.linear(columns, w["gate_up"]).unflatten(-1, (2, -1)), w["down"])
    kept = dict.fromkeys(("norm", "projection", "heads", "attention", "feed-forward"), 0.0)
    for where, tensor in found.values():
        kept[where] += tensor.untyped_storage().nbytes() / TOKENS
    return kept


def kits() -> dict[str, Kit]:
    """Ours, with parallel.recompute none; ours with the feed-forward network of selective; the rivals'.

    Attention is ours in each: what it keeps, any fused attention does.
    """
    return {
        "ours": Kit(_our_norm, _our_heads, lambda gate_up, weight: F.linear(swiglu(gate_up), weight)),
        "ours, product made again": Kit(_our_norm, _our_heads, swiglu_linear),
        "torch": Kit(_torch_norm, _torch_heads, _torch_contract),
        "liger": Kit(_liger_norm, _torch_heads, _liger_contract),
    }


def table() -> list[dict[str, Any]]:
    """A row for every model and kit: bytes per token and layer, by part and together.

    Raises: RuntimeError where Triton interprets.
    """
    with hopper():
        return [
            {"model": model.name, "kit": name, **(kept := bytes_per_token(model, kit)), "together": sum(kept.values())}
            for model in MODELS
            for name, kit in kits().items()
        ]


def _layer(model: Model) -> Layer:
    head_dim, ffn = model.head_dim, model.ffn_local[0]
    qkv = (model.heads + 2 * model.kv_heads) * head_dim
    shapes = {
        "norm": (model.width,), "norm_bias": (model.width,), "qkv": (qkv, model.width), "out": (model.width, model.width),
        "gate_up": (2 * ffn, model.width), "down": (model.width, ffn),
        "query_norm": (model.heads, head_dim), "key_norm": (model.kv_heads, head_dim),
    }  # fmt: skip
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for name, shape in shapes.items()
    }
    cos, sin = (torch.empty(1, TOKENS, model.rotary_dims // 2, device="meta") for _ in range(2))
    starts = torch.empty(1, TOKENS, dtype=torch.int32, device="meta")
    return Layer(model, weights, cos, sin, starts, torch.empty(model.heads, device="meta"))


def _our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, EPSILON)


def _our_heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    model, w = layer.model, layer.weights
    if model.rotary_dims == 0:
        return split(qkv, head_dim=model.head_dim, queries=layer.group)
    norms = {name: w[name] for name in ("query_norm", "key_norm") if model.qk_norm}
    return split_rotated(
        qkv, layer.cos, layer.sin, head_dim=model.head_dim, queries=layer.group, epsilon=EPSILON, **norms
    )


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def _torch_heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """In bf16 throughout, which keeps least: the one that is timed in `ops.qkv` norms and turns in fp32, as ours does."""
    model, w = layer.model, layer.weights
    grouped = qkv.transpose(0, 1).unflatten(-1, (-1, layer.group + 2, model.head_dim))
    query, key, value = (x.flatten(2, 3) for x in grouped.split((layer.group, 1, 1), dim=3))
    if model.qk_norm:
        query, key = (
            F.layer_norm(x, x.shape[-1:], eps=EPSILON) * weight
            for x, weight in ((query, w["query_norm"]), (key, w["key_norm"]))
        )
    if model.rotary_dims:
        query, key = (_torch_rotated(x, layer.cos.bfloat16(), layer.sin.bfloat16()) for x in (query, key))
    return query, key, value


def _torch_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _torch_contract(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.unbind(-2)
    return F.linear(F.silu(gate) * up, weight)


def _liger_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPSILON)


def _liger_contract(gate_up: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # It reads rows of one length: halves of a fused buffer are copied first.
    gate, up = (half.contiguous() for half in gate_up.unbind(-2))
    return F.linear(LigerSiLUMulFunction.apply(gate, up), weight)
