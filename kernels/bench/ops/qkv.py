"""A fused projection [seq, rows, ...] split into queries, keys and values [rows, seq, heads, head_dim].

Queries and keys are normalized per head if the model does that, and rotated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Function, Operation, RandomTensors, Rival, Work, upcast
from tandem.kernels.bench.ops.attention import document_starts
from tandem.kernels.bench.shapes import SMALL_MODELS, AttentionShape, attention_shapes
from tandem.kernels.qkv import split_and_rotate_qkv
from tandem.kernels.rope import rotary_table

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0


def _make_example(shape: AttentionShape, random: RandomTensors) -> Example:
    """The buffer, cosines and sines, and the weights of both norms if there are norms."""
    starts, index = document_starts(shape, random.device), torch.arange(shape.tokens, device=random.device)[None]
    positions = index if starts is None else index - starts
    inputs = [random.leaf(shape.tokens, shape.batch_size, num_slots(shape) * shape.head_dim)]
    inputs += rotary_table(positions, shape.rotary_dims, ROTARY_BASE)
    if shape.qk_layernorm:
        inputs += [random.leaf(count, shape.head_dim) for count in (shape.num_heads, shape.num_kv_heads)]
    counts = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
    gradients = (random.normal(shape.batch_size, shape.tokens, count, shape.head_dim) for count in counts)
    return Example(tuple(inputs), tuple(gradients))


def _forward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Reads the buffer, the tables and the weights, writes the three parts of the buffer."""
    buffer = shape.batch_size * shape.tokens * num_slots(shape) * shape.head_dim
    return Work((2 * buffer + _num_norm_weights(shape)) * element_bytes + _table_bytes(shape))


def _backward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Reads three gradients, writes one; with norms also reads queries and keys, and writes the weights' gradients."""
    tokens = shape.batch_size * shape.tokens * shape.head_dim
    norm_inputs = tokens * (shape.num_heads + shape.num_kv_heads) if shape.qk_layernorm else 0
    elements = 2 * tokens * num_slots(shape) + norm_inputs + 2 * _num_norm_weights(shape)
    return Work(elements * element_bytes + _table_bytes(shape))


def num_slots(shape: AttentionShape) -> int:
    """Heads of the fused buffer."""
    return shape.num_heads + 2 * shape.num_kv_heads


def _num_norm_weights(shape: AttentionShape) -> int:
    return (shape.num_heads + shape.num_kv_heads) * shape.head_dim if shape.qk_layernorm else 0


def _table_bytes(shape: AttentionShape) -> int:
    """Two fp32 numbers for each pair of dims. Every row has its own table if rows hold documents."""
    return 4 * shape.tokens * shape.rotary_dims * (shape.batch_size if shape.document_masking else 1)


def our_qkv(shape: AttentionShape) -> Function:
    queries_per_kv = shape.num_heads // shape.num_kv_heads
    sizes: dict[str, Any] = {"head_dim": shape.head_dim, "num_queries_per_kv": queries_per_kv, "norm_eps": NORM_EPS}

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        norms: dict[str, Any] = dict(zip(("query_norm", "key_norm"), weights, strict=False))
        return split_and_rotate_qkv(qkv, cos, sin, **sizes, **norms)

    return rotated


def split_heads(shape: AttentionShape, qkv: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the first two are normalized if there are weights, and not yet rotated."""
    queries = shape.num_heads // shape.num_kv_heads
    grouped = qkv.transpose(0, 1).unflatten(-1, (-1, queries + 2, shape.head_dim))
    query, key, value = grouped[..., :queries, :].flatten(2, 3), grouped[..., queries, :], grouped[..., queries + 1, :]
    if weights:
        query, key = _normalize(query, weights[0]), _normalize(key, weights[1])
    return query, key, value.contiguous()


def _normalize(x: Tensor, weight: Tensor) -> Tensor:
    return (F.layer_norm(upcast(x), x.shape[-1:], eps=NORM_EPS) * weight).to(x.dtype)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)


def torch_qkv(shape: AttentionShape) -> Function:
    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = split_heads(shape, qkv, weights)
        return _apply_rotary(query, cos, sin), _apply_rotary(key, cos, sin), value

    return rotated


def _rotary_shapes(shapes: list[AttentionShape]) -> list[AttentionShape]:
    return [shape for shape in shapes if shape.rotary_dims]


QKV = Operation(
    "qkv", "copy", _make_example, _forward_work, _backward_work,
    rivals=[Rival("ours", our_qkv, needs_gpu=False), Rival("torch", torch_qkv, needs_gpu=False)],
    shapes=_rotary_shapes(attention_shapes(tp_sizes=(1,))),
    extra_shapes=_rotary_shapes(attention_shapes(tp_sizes=(2, 4)) + attention_shapes(SMALL_MODELS)),
)  # fmt: skip
