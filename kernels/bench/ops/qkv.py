"""A fused projection [seq, rows, ...] taken apart into queries, keys and values [rows, seq, heads, head_dim].

Queries and keys are normalised by heads where the model does that, and rotated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.documents import document_starts
from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Rival,
    SkipRival,
    Work,
    compile_function,
    random_leaf,
    random_tensor,
    upcast,
)
from tandem.kernels.bench.shapes import SMALL_MODELS, AttentionShape, attention_shapes

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0


def _make_example(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    """The buffer, cosines and sines, and the weights of both norms where there are norms."""
    from tandem.kernels.rope import rotary_table

    begin, index = document_starts(shape, device), torch.arange(shape.tokens, device=device)[None]
    places = index if begin is None else index - begin
    inputs = [
        random_leaf((shape.tokens, shape.batch_size, _num_slots(shape) * shape.head_dim), device, dtype, generator)
    ]
    inputs += rotary_table(places, shape.rotary_dims, ROTARY_BASE)
    if shape.qk_layernorm:
        inputs += [
            random_leaf((count, shape.head_dim), device, dtype, generator)
            for count in (shape.num_heads, shape.num_kv_heads)
        ]
    sizes = [
        (shape.batch_size, shape.tokens, count, shape.head_dim)
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    return Example(tuple(inputs), tuple(random_tensor(size, device, dtype, generator) for size in sizes))


def _forward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """The buffer in, its three parts out, the tables and weights in."""
    buffer = shape.batch_size * shape.tokens * _num_slots(shape) * shape.head_dim
    return Work((2 * buffer + _num_norm_weights(shape)) * element_bytes + _table_bytes(shape))


def _backward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Three gradients in, one out; with norms queries and keys in once more, and the weights' gradients out."""
    tokens = shape.batch_size * shape.tokens * shape.head_dim
    norm_input_elements = tokens * (shape.num_heads + shape.num_kv_heads) if shape.qk_layernorm else 0
    elements = 2 * tokens * _num_slots(shape) + norm_input_elements + 2 * _num_norm_weights(shape)
    return Work(elements * element_bytes + _table_bytes(shape))


def _num_slots(shape: AttentionShape) -> int:
    return shape.num_heads + 2 * shape.num_kv_heads


def _num_norm_weights(shape: AttentionShape) -> int:
    return (shape.num_heads + shape.num_kv_heads) * shape.head_dim if shape.qk_layernorm else 0


def _table_bytes(shape: AttentionShape) -> int:
    """Two fp32 numbers for a pair of dims; the rows differ where they hold documents."""
    return 4 * shape.tokens * shape.rotary_dims * (shape.batch_size if shape.document_masking else 1)


def _ours(shape: AttentionShape) -> Function:
    from tandem.kernels.qkv import split_and_rotate_qkv

    sizes: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "num_queries_per_kv": shape.num_heads // shape.num_kv_heads,
        "norm_eps": NORM_EPS,
    }

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        norms: dict[str, Any] = dict(zip(("query_norm", "key_norm"), weights, strict=False))
        return split_and_rotate_qkv(qkv, cos, sin, **sizes, **norms)

    return rotated


def _split(shape: AttentionShape, qkv: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """With norms where there are weights, not yet rotated."""
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


def _torch(shape: AttentionShape) -> Function:
    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        return _apply_rotary(query, cos, sin), _apply_rotary(key, cos, sin), value

    return rotated


def _liger(shape: AttentionShape) -> Function:
    """Its LayerNorm has one weight for all heads, so the norms are torch's; its tables hold every angle twice."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        tables = (torch.cat((table, table), -1) for table in (cos, sin))
        turned = LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *tables)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2), value

    return rotated


def _megatron(shape: AttentionShape) -> Function:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb as fused

    if fused is None:
        raise ImportError("Megatron's fused rotary positions need Transformer Engine")
    if shape.document_masking:
        raise SkipRival("Megatron's fused rotary positions have one table for all rows")

    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query, key, value = _split(shape, qkv, weights)
        angles = torch.atan2(sin, cos)[0, :, None, None]
        tables = torch.cat((angles, angles), -1)
        turned = (fused(x.transpose(0, 1), tables).transpose(0, 1) for x in (query, key))
        return *turned, value

    return rotated


def _launch_kernels(shape: AttentionShape) -> None:
    from tandem.kernels.device import qkv as device

    queries, width = shape.num_heads // shape.num_kv_heads, _num_slots(shape) * shape.head_dim
    buffer = torch.empty(shape.tokens, shape.batch_size, width, dtype=shape.dtype, device="meta")
    table_rows = shape.batch_size if shape.document_masking else 1
    cos, sin = (torch.empty(table_rows, shape.tokens, shape.rotary_dims // 2, device="meta") for _ in range(2))
    counts = (shape.num_heads, shape.num_kv_heads) if shape.qk_layernorm else (None, None)
    norms: Any = [
        None if n is None else torch.empty(n, shape.head_dim, dtype=shape.dtype, device="meta") for n in counts
    ]
    parts = device.forward(buffer, cos, sin, norms[0], norms[1], NORM_EPS, shape.head_dim, queries)
    device.backward(*parts, buffer if shape.qk_layernorm else None, cos, sin, norms[0], norms[1], NORM_EPS)


def _rotary_shapes(shapes: list[AttentionShape]) -> list[AttentionShape]:
    return [shape for shape in shapes if shape.rotary_dims]


QKV = Operation(
    name="qkv",
    ceiling="copy",
    shapes=_rotary_shapes(attention_shapes(tp_sizes=(1,))),
    extra_shapes=_rotary_shapes(attention_shapes(tp_sizes=(2, 4)) + attention_shapes(SMALL_MODELS)),
    make_example=_make_example,
    forward_work=_forward_work,
    backward_work=_backward_work,
    rivals=[
        Rival("ours", _ours, needs_gpu=False),
        Rival("torch", _torch, needs_gpu=False),
        Rival("torch.compile", lambda shape: compile_function(_torch(shape)), is_slow_to_compile=True),
        Rival("liger rope", _liger),
        Rival("megatron rope", _megatron),
    ],
    launch_kernels=_launch_kernels,
    precision=Precision(("query", "key", "value", "d qkv", "d query_norm", "d key_norm"), _ours, _torch),
)
