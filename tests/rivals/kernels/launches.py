"""The launchers of our kernels, called on the meta device at a shape, so that they compile what they would run there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tandem.kernels.bench.ops import NORM_EPS, num_slots
from tandem.kernels.bench.shapes import Shape
from tandem.kernels.cross_entropy import initial_statistics
from tandem.kernels.linear_cross_entropy import columns_per_chunk


def _launch_attention(shape: Shape) -> None:
    from tandem.kernels.device import attention as device

    query, key, value = (
        _empty(shape.batch_size, shape.tokens, n, shape.head_dim, dtype=shape.dtype)
        for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    slopes = _empty(shape.num_heads) if shape.has_alibi else None
    starts = _empty(shape.batch_size, shape.tokens, dtype=torch.int32) if shape.document_masking else None
    out, statistics = device.forward(query, key, value, shape.attention_scale, slopes, starts)
    device.backward(out, query, key, value, out, statistics, shape.attention_scale, slopes, starts)


def _launch_swiglu(shape: Shape, with_product: bool = False) -> None:
    from tandem.kernels.device import swiglu

    gate_up = _empty(shape.tokens, 2, shape.ffn_hidden_size, dtype=shape.dtype)
    swiglu.backward(swiglu.forward(gate_up, 0), gate_up, 0, with_product=with_product)


def _launch_swiglu_linear(shape: Shape) -> None:
    _launch_swiglu(shape, with_product=True)


def _launch_qkv(shape: Shape) -> None:
    from tandem.kernels.device import qkv as device

    queries, width = shape.num_heads // shape.num_kv_heads, num_slots(shape) * shape.head_dim
    buffer = _empty(shape.tokens, shape.batch_size, width, dtype=shape.dtype)
    table_rows = shape.batch_size if shape.document_masking else 1
    cos, sin = (_empty(table_rows, shape.tokens, shape.rotary_dims // 2) for _ in range(2))
    counts = (shape.num_heads, shape.num_kv_heads) if shape.qk_layernorm else (None, None)
    norms = [None if n is None else _empty(n, shape.head_dim, dtype=shape.dtype) for n in counts]
    parts = device.forward(buffer, cos, sin, norms[0], norms[1], NORM_EPS, shape.head_dim, queries)
    device.backward(*parts, buffer if shape.qk_layernorm else None, cos, sin, norms[0], norms[1], NORM_EPS)


def _launch_cross_entropy(shape: Shape) -> None:
    _launch_on_block(_empty(shape.tokens, shape.padded_vocab_size, dtype=shape.dtype), shape)


def _launch_linear_cross_entropy(shape: Shape) -> None:
    width = min(columns_per_chunk(shape.padded_vocab_size), shape.padded_vocab_size)
    buffer = _empty(shape.tokens, width, dtype=shape.dtype)
    for first in range(0, shape.padded_vocab_size, width):
        _launch_on_block(buffer[:, : shape.padded_vocab_size - first], shape, first)


def _launch_on_block(block: Tensor, shape: Shape, first: int = 0) -> None:
    from tandem.kernels.device import cross_entropy as device

    targets = _empty(shape.tokens, dtype=torch.int64)
    statistics = initial_statistics(block, targets)
    columns = min(max(shape.vocab_size - first, 0), block.shape[1])
    settings: dict[str, Any] = {"first": first, "columns": columns, "scale": shape.logit_scale}
    device.add_block(block, targets, statistics, **settings)
    device.write_block_gradient(block, targets, *statistics, **settings)


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


LAUNCHES: dict[str, Callable[[Any], None]] = {
    "attention": _launch_attention,
    "linear_cross_entropy": _launch_linear_cross_entropy,
    "swiglu": _launch_swiglu,
    "swiglu_linear": _launch_swiglu_linear,
    "qkv": _launch_qkv,
    "cross_entropy": _launch_cross_entropy,
}
"""By operation: launches all of its kernels, forward and backward."""
