"""The bytes per token that one layer keeps for backward: ours, plain torch's and Liger's, at real widths without a GPU.

A layer is built from interchangeable operations and run on the meta device, where tensors have sizes and no values. Hooks
count every distinct storage that autograd keeps, for the first part of the layer that keeps it. Weights do not count, nor does
what all layers share: angles, slopes, and the starts of documents. Liger's launchers compile as they would for a Hopper GPU and
launch nothing (`offline_compile`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.attention import attention
from tandem.kernels.bench.shapes import MODELS, Model
from tandem.kernels.layer_norm import layer_norm
from tandem.kernels.qkv import split_and_rotate_qkv, split_qkv
from tandem.kernels.swiglu import swiglu, swiglu_linear
from tests.rivals.kernels.offline_compile import compile_for_sm90

NUM_TOKENS = 256
"""Bytes per token do not depend on the number of tokens, unless scores are written out, which is not done here."""
NORM_EPS = 1e-5


@dataclass(frozen=True)
class LayerImplementation:
    """The operations between the matrix products of a layer."""

    norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    split_heads: Callable[[Tensor, "Layer"], tuple[Tensor, Tensor, Tensor]]
    """Returns queries, keys and values, normalized and rotated if the model does that."""
    down_projection: Callable[[Tensor, Tensor], Tensor]
    """SwiGLU and the product with the matrix that follows."""


@dataclass(frozen=True)
class Layer:
    model: Model
    weights: dict[str, Tensor]
    cos: Tensor
    sin: Tensor
    document_starts: Tensor
    alibi_slopes: Tensor

    @property
    def num_queries_per_kv(self) -> int:
        return self.model.num_heads // self.model.num_kv_heads


def bytes_per_token(model: Model, implementation: LayerImplementation) -> dict[str, float]:
    """Return the bytes by part of the layer. The layer's input counts for the first norm."""
    layer = _layer(model)
    found: dict[int, tuple[str, Tensor]] = {}
    shared = (*layer.weights.values(), layer.cos, layer.sin, layer.document_starts, layer.alibi_slopes)
    shared_storages = {tensor.untyped_storage()._cdata for tensor in shared}
    part = ""

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared_storages:
            # Hold the tensor: a later storage could otherwise get the address of a freed one.
            found.setdefault(storage._cdata, (part, tensor))
        return tensor

    w = layer.weights
    x = torch.empty(NUM_TOKENS, 1, model.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        part = "norm"
        columns = implementation.norm(x, w["norm"], w["norm_bias"])
        part = "projection"
        qkv = F.linear(columns, w["qkv"])
        part = "heads"
        query, key, value = implementation.split_heads(qkv, layer)
        part = "attention"
        biases = layer.alibi_slopes if model.rotary_dims == 0 else None
        starts = layer.document_starts if model.document_masking else None
        mixed = attention(query, key, value, scale=model.attention_scale, slopes=biases, document_starts=starts)
        mixed = F.linear(mixed.flatten(2).transpose(0, 1), w["out"])
        if model.rotary_dims == 0:  # BTLM's layer is sequential: a second norm
            part = "norm"
            columns = implementation.norm(x + mixed, w["norm"], w["norm_bias"])
        part = "feed-forward"
        implementation.down_projection(F.linear(columns, w["gate_up"]).unflatten(-1, (2, -1)), w["down"])
    part_bytes = dict.fromkeys(("norm", "projection", "heads", "attention", "feed-forward"), 0.0)
    for part_name, tensor in found.values():
        part_bytes[part_name] += tensor.untyped_storage().nbytes() / NUM_TOKENS
    return part_bytes


def layer_implementations() -> dict[str, LayerImplementation]:
    """Return ours with `parallel.recompute: none`, ours with the feed-forward network of `selective`, torch's and Liger's.

    All use our attention, because every fused attention keeps the same tensors.
    """
    return {
        "ours": LayerImplementation(_our_norm, _our_heads, lambda gate_up, weight: F.linear(swiglu(gate_up), weight)),
        "ours, product made again": LayerImplementation(_our_norm, _our_heads, swiglu_linear),
        "torch": LayerImplementation(_torch_norm, _torch_heads, _torch_down_projection),
        "liger": LayerImplementation(_liger_norm, _torch_heads, _liger_down_projection),
    }


def activation_memory_table() -> list[dict[str, Any]]:
    """Return a row for every model and implementation: bytes per token and layer, by part and in total.

    Raises: RuntimeError if Triton interprets.
    """
    with compile_for_sm90():
        return [
            {
                "model": model.name,
                "implementation": name,
                **(kept := bytes_per_token(model, implementation)),
                "total": sum(kept.values()),
            }
            for model in MODELS
            for name, implementation in layer_implementations().items()
        ]


def _layer(model: Model) -> Layer:
    head_dim, ffn = model.head_dim, model.ffn_hidden_size
    qkv = (model.num_heads + 2 * model.num_kv_heads) * head_dim
    shapes = {
        "norm": (model.hidden_size,),
        "norm_bias": (model.hidden_size,),
        "qkv": (qkv, model.hidden_size),
        "out": (model.hidden_size, model.hidden_size),
        "gate_up": (2 * ffn, model.hidden_size),
        "down": (model.hidden_size, ffn),
        "query_norm": (model.num_heads, head_dim),
        "key_norm": (model.num_kv_heads, head_dim),
    }
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for name, shape in shapes.items()
    }
    cos, sin = (torch.empty(1, NUM_TOKENS, model.rotary_dims // 2, device="meta") for _ in range(2))
    starts = torch.empty(1, NUM_TOKENS, dtype=torch.int32, device="meta")
    return Layer(model, weights, cos, sin, starts, torch.empty(model.num_heads, device="meta"))


def _our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, NORM_EPS)


def _our_heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    model, w = layer.model, layer.weights
    if model.rotary_dims == 0:
        return split_qkv(qkv, head_dim=model.head_dim, num_queries_per_kv=layer.num_queries_per_kv)
    norms = {name: w[name] for name in ("query_norm", "key_norm") if model.qk_layernorm}
    return split_and_rotate_qkv(
        qkv,
        layer.cos,
        layer.sin,
        head_dim=model.head_dim,
        num_queries_per_kv=layer.num_queries_per_kv,
        norm_eps=NORM_EPS,
        **norms,
    )


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)


def _torch_heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """All in bf16, which keeps the least. The one timed in `ops.qkv` normalizes and rotates in fp32, as ours does."""
    model, w = layer.model, layer.weights
    grouped = qkv.transpose(0, 1).unflatten(-1, (-1, layer.num_queries_per_kv + 2, model.head_dim))
    query, key, value = (x.flatten(2, 3) for x in grouped.split((layer.num_queries_per_kv, 1, 1), dim=3))
    if model.qk_layernorm:
        pairs = (query, w["query_norm"]), (key, w["key_norm"])
        query, key = (F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * weight for x, weight in pairs)
    if model.rotary_dims:
        query, key = (_torch_rotary(x, layer.cos.bfloat16(), layer.sin.bfloat16()) for x in (query, key))
    return query, key, value


def _torch_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _torch_down_projection(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.unbind(-2)
    return F.linear(F.silu(gate) * up, weight)


def _liger_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, NORM_EPS)


def _liger_down_projection(gate_up: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Liger's kernel needs contiguous rows, so the halves of a fused buffer are copied first.
    gate, up = (half.contiguous() for half in gate_up.unbind(-2))
    return F.linear(LigerSiLUMulFunction.apply(gate, up), weight)
