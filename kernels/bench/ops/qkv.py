"""A fused projection [seq, rows, ...] taken apart into queries, keys and values [rows, seq, heads, head_dim].

Queries and keys are normalised by heads where the model does that, and rotated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.documents import starts
from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Refused,
    Rival,
    Work,
    at_least_fp32,
    compiled,
    leaf,
    values,
)
from tandem.kernels.bench.shapes import SMALL_MODELS, Heads, heads

EPSILON = 1e-5
ROTARY_BASE = 10_000.0


def _example(shape: Heads, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    """The buffer, cosines and sines, and the weights of both norms where there are norms."""
    from tandem.kernels.rope import rotary_table

    begin, index = starts(shape, device), torch.arange(shape.tokens, device=device)[None]
    places = index if begin is None else index - begin
    inputs = [leaf((shape.tokens, shape.rows, _slots(shape) * shape.head_dim), device, dtype, generator)]
    inputs += rotary_table(places, shape.rotary_dims, ROTARY_BASE)
    if shape.qk_norm:
        inputs += [leaf((count, shape.head_dim), device, dtype, generator) for count in (shape.heads, shape.kv_heads)]
    sizes = [
        (shape.rows, shape.tokens, count, shape.head_dim) for count in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    return Example(tuple(inputs), tuple(values(size, device, dtype, generator) for size in sizes))


def _forward(shape: Heads, element_bytes: int) -> Work:
    """The buffer in, its three parts out, the tables and weights in."""
    buffer = shape.rows * shape.tokens * _slots(shape) * shape.head_dim
    return Work((2 * buffer + _weights(shape)) * element_bytes + _table_bytes(shape))


def _backward(shape: Heads, element_bytes: int) -> Work:
    """Three gradients in, one out; with norms queries and keys in once more, and the weights' gradients out."""
    tokens = shape.rows * shape.tokens * shape.head_dim
    again = tokens * (shape.heads + shape.kv_heads) if shape.qk_norm else 0
    elements = 2 * tokens * _slots(shape) + again + 2 * _weights(shape)
    return Work(elements * element_bytes + _table_bytes(shape))


def _slots(shape: Heads) -> int:
    return shape.heads + 2 * shape.kv_heads


def _weights(shape: Heads) -> int:
    return (shape.heads + shape.kv_heads) * shape.head_dim if shape.qk_norm else 0


def _table_bytes(shape: Heads) -> int:
    """Two fp32 numbers for a pair of dims; the rows differ where they hold documents."""
    return 4 * shape.tokens * shape.rotary_dims * (shape.rows if shape.documents else 1)


def _ours(shape: Heads) -> Function:
    from tandem.kernels.qkv import split_rotated

    sizes: dict[str, Any] = {"head_dim": shape.head_dim, "queries": shape.heads // shape.kv_heads, "epsilon": EPSILON}

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        norms: dict[str, Any] = dict(zip(("query_norm", "key_norm"), weights, strict=False))
        return split_rotated(qkv, cos, sin, **sizes, **norms)

    return rotated


def _split(shape: Heads, qkv: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """With norms where there are weights, not yet rotated."""
    queries = shape.heads // shape.kv_heads
    grouped = qkv.transpose(0, 1).unflatten(-1, (-1, queries + 2, shape.head_dim))
    query, key, value = grouped[..., :queries, :].flatten(2, 3), grouped[..., queries, :], grouped[..., queries + 1, :]
    if weights:
        query, key = _normal(query, weights[0]), _normal(key, weights[1])
    return query, key, value.contiguous()


def _normal(x: Tensor, weight: Tensor) -> Tensor:
    return (F.layer_norm(at_least_fp32(x), x.shape[-1:], eps=EPSILON) * weight).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)


def _torch(shape: Heads) -> Function:
    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        return _turned(query, cos, sin), _turned(key, cos, sin), value

    return rotated


def _liger(shape: Heads) -> Function:
    """Its LayerNorm has one weight for all heads, so the norms are torch's; its tables hold every angle twice."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        tables = (torch.cat((table, table), -1) for table in (cos, sin))
        turned = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2), value

    return rotated


def _megatron(shape: Heads) -> Function:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb as fused

    if fused is None:
        raise ImportError("Megatron's fused rotary positions need Transformer Engine")
    if shape.documents:
        raise Refused("Megatron's fused rotary positions have one table for all rows")

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        angles = torch.atan2(sin, cos)[0, :, None, None]
        tables = torch.cat((angles, angles), -1)
        turned = (fused(x.transpose(0, 1), tables).transpose(0, 1) for x in (query, key))
        return *turned, value

    return rotated


def _launches(shape: Heads) -> None:
    from tandem.kernels.device import qkv as device

    queries, width = shape.heads // shape.kv_heads, _slots(shape) * shape.head_dim
    buffer = torch.empty(shape.tokens, shape.rows, width, dtype=shape.dtype, device="meta")
    table_rows = shape.rows if shape.documents else 1
    cos, sin = (torch.empty(table_rows, shape.tokens, shape.rotary_dims // 2, device="meta") for _ in range(2))
    counts = (shape.heads, shape.kv_heads) if shape.qk_norm else (None, None)
    norms: Any = [
        None if n is None else torch.empty(n, shape.head_dim, dtype=shape.dtype, device="meta") for n in counts
    ]
    parts = device.forward(buffer, cos, sin, norms[0], norms[1], EPSILON, shape.head_dim, queries)
    device.backward(*parts, buffer if shape.qk_norm else None, cos, sin, norms[0], norms[1], EPSILON)


def _rotated(shapes: list[Heads]) -> list[Heads]:
    return [shape for shape in shapes if shape.rotary_dims]


QKV = Operation(
    name="qkv",
    ceiling="copy",
    shapes=_rotated(heads(tp_sizes=(1,))),
    more_shapes=_rotated(heads(tp_sizes=(2, 4)) + heads(SMALL_MODELS)),
    example=_example,
    forward=_forward,
    backward=_backward,
    rivals=[
        Rival("ours", _ours, gpu=False),
        Rival("torch", _torch, gpu=False),
        Rival("torch.compile", lambda shape: compiled(_torch(shape)), compiles=True),
        Rival("liger rope", _liger),
        Rival("megatron rope", _megatron),
    ],
    launches=_launches,
    precision=Precision(("query", "key", "value", "d qkv", "d query_norm", "d key_norm"), _ours, _torch),
)
