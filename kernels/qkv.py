"""Split a fused projection into queries, keys and values, with or without their norms and rotation.

    forward   y  = R(w * n),  n = (x - mean) * r,  r = 1 / sqrt(variance + epsilon),  over the dims of each head
    backward  g  = w * R'(dy),  dx = r * (g - mean(g) - n * mean(g * n)),  dw = sum of R'(dy) * n over all tokens

R rotates the pairs (i, i + half) of the leading dims, x1, x2 -> x1 cos - x2 sin, x2 cos + x1 sin; R' is R with the sine
negated. Without weights y = R(x) and dx = R'(dy), so backward keeps nothing of the projection. The buffer is [seq, rows, ...]
with heads grouped by key head: its queries, its key, its value. Results are [rows, seq, heads, head_dim].
"""

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tandem.kernels.device.shared import upcast

QueryKeyValue = tuple[
    Float[Tensor, "rows seq num_heads_local head_dim"],
    Float[Tensor, "rows seq num_kv_heads_local head_dim"],
    Float[Tensor, "rows seq num_kv_heads_local head_dim"],
]


def split_qkv(qkv: Float[Tensor, "seq rows qkv_local"], *, head_dim: int, num_queries_per_kv: int) -> QueryKeyValue:
    """Return queries, keys and values; all are views, except queries that share a key.

    Note: for `split` autograd joins the three gradients in one buffer; for slices it would add three buffers full of zeros.
    """
    grouped = qkv.unflatten(-1, (-1, num_queries_per_kv + 2, head_dim))
    query, key, value = grouped.split((num_queries_per_kv, 1, 1), dim=-2)
    query, key, value = (heads.flatten(2, 3).transpose(0, 1) for heads in (query, key, value))
    return query, key, value


def split_and_rotate_qkv(
    qkv: Float[Tensor, "seq rows qkv_local"],
    cos: Float32[Tensor, "#rows seq rotary_half"],
    sin: Float32[Tensor, "#rows seq rotary_half"],
    *,
    head_dim: int,
    num_queries_per_kv: int,
    query_norm: Float[Tensor, "num_heads_local head_dim"] | None = None,
    key_norm: Float[Tensor, "num_kv_heads_local head_dim"] | None = None,
    norm_eps: float = 0.0,
) -> QueryKeyValue:
    """Return rotated queries and keys, and values as they are; each contiguous. fp32 inside (fp64 for fp64), rounded once.

    With weights, queries and keys are first normalized: every head over its own dims, with its own weight, biased variance and
    no bias. The first 2 * rotary_half dims of each head are rotated.

    Source: Su et al. 2021, "RoFormer", section 3.2.2; query and key norms of Stable LM 2 12B.
    """
    return torch.ops.tandem.split_and_rotate_qkv(
        qkv, cos, sin, query_norm, key_norm, norm_eps, head_dim, num_queries_per_kv
    )


@torch.library.custom_op("tandem::split_and_rotate_qkv", mutates_args=(), device_types="cpu")
def _split_and_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
    epsilon: float, head_dim: int, queries: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = split_qkv(qkv, head_dim=head_dim, num_queries_per_kv=queries)
    rotated = []
    for heads, weight in ((query, query_norm), (key, key_norm)):
        wide = upcast(heads)
        if weight is not None:
            wide = _normalize(wide, epsilon)[0] * upcast(weight)
        rotated.append(_apply_rotary(wide, cos, sin).to(qkv.dtype).contiguous())
    # The result of a custom op must not be a view of its input.
    return rotated[0], rotated[1], value.clone(memory_format=torch.contiguous_format)


@_split_and_rotate.register_kernel("cuda")
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
    epsilon: float, head_dim: int, queries: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from tandem.kernels.device import qkv as device

    return device.forward(qkv, cos, sin, query_norm, key_norm, epsilon, head_dim, queries)


@_split_and_rotate.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
    epsilon: float, head_dim: int, queries: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    seq, rows, width = qkv.shape
    num_kv_heads = width // head_dim // (queries + 2)
    counts = num_kv_heads * queries, num_kv_heads, num_kv_heads
    query, key, value = (qkv.new_empty(rows, seq, heads, head_dim) for heads in counts)
    return query, key, value


@torch.library.custom_op("tandem::split_and_rotate_qkv_backward", mutates_args=(), device_types="cpu")
def _split_and_rotate_backward(
    query: Tensor, key: Tensor, value: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the fused buffer and of the norms' weights, given those of queries, keys and values.

    The latter are in the dtype of the arithmetic, the query norm's first, and empty without norms.
    """
    rows, seq, num_kv_heads, head_dim = key.shape
    queries = query.shape[2] // num_kv_heads
    heads = [_apply_rotary(upcast(gradient), cos, -sin) for gradient in (query, key)]
    sums = key.new_empty(0, dtype=heads[0].dtype)
    if qkv is not None and query_norm is not None and key_norm is not None:
        inputs = split_qkv(qkv, head_dim=head_dim, num_queries_per_kv=queries)[:2]
        normals = [_normalize(upcast(x), epsilon) for x in inputs]
        sums = torch.cat([(dy * n).sum((0, 1)) for dy, (n, _) in zip(heads, normals, strict=True)])
        heads = [dy * upcast(weight) for dy, weight in zip(heads, (query_norm, key_norm), strict=True)]
        heads = [
            scale * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
            for g, (n, scale) in zip(heads, normals, strict=True)
        ]
    groups = [x.to(key.dtype).unflatten(2, (num_kv_heads, -1)) for x in (*heads, value)]
    return torch.cat(groups, dim=3).transpose(0, 1).reshape(seq, rows, -1).contiguous(), sums


@_split_and_rotate_backward.register_kernel("cuda")
def _(
    query: Tensor, key: Tensor, value: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from tandem.kernels.device import qkv as device

    return device.backward(query, key, value, qkv, cos, sin, query_norm, key_norm, epsilon)


@_split_and_rotate_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, seq, num_kv_heads, head_dim = key.shape
    heads = query.shape[2] + num_kv_heads
    shape = (0,) if query_norm is None else (heads, head_dim)
    sums = key.new_empty(shape, dtype=torch.promote_types(key.dtype, torch.float32))
    return key.new_empty(seq, rows, (heads + num_kv_heads) * head_dim), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, query_norm, key_norm, ctx.epsilon, _, _ = inputs
    ctx.save_for_backward(None if query_norm is None else qkv, cos, sin, query_norm, key_norm)


def _autograd_backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # read once: under recomputation a second read fails
    gradient, sums = torch.ops.tandem.split_and_rotate_qkv_backward(query, key, value, *kept, ctx.epsilon)
    norms = [None, None]
    if len(sums):
        parts = sums.split((query.shape[2], key.shape[2]))
        norms = [part.to(weight.dtype) for part, weight in zip(parts, kept[3:], strict=True)]
    return gradient, None, None, *norms, None, None, None


_split_and_rotate.register_autograd(_autograd_backward, setup_context=_setup_context)


def _normalize(heads: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return heads with mean 0 and variance 1, and the reciprocal of their standard deviation."""
    normal, _, scale = torch.native_layer_norm(heads, heads.shape[-1:], None, None, epsilon)
    return normal, scale


def _apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary_half = cos.shape[-1]
    first, second, rest = heads.tensor_split((rotary_half, 2 * rotary_half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
