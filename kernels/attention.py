"""Causal attention with grouped keys, linear biases (ALiBi) and separate documents.

    forward   p = softmax(scale * q k^T - slope * (i - j)) over the keys j of i's document up to i itself,  y = p v
    backward  dv = p^T dy,  ds = p * (dy v^T - rowsum(dy * y)),  dq = scale * ds k,  dk = scale * ds^T q

Backward keeps q, k, v, y and the logarithm of each softmax's denominator, and computes p from them again. On a GPU our kernel
never holds the matrix of scores; on a CPU the scores of a block of queries are written out at a time. Attention with neither
biases nor documents uses SDPA's causal path on any device.

If there are fewer queries than keys, the queries are the last positions and the other keys come from a cache. Such queries are
few, so their scores are written out on a GPU too.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from tandem.kernels.device.shared import like

MAX_HEAD_DIM = 256
"""The widest heads that the kernel has tiles for. Scores of wider heads are written out on a GPU too."""
FP32_HEAD_DIMS = (16, 32, 64)
"""The fp32 heads that fit in the kernel's registers. Others would spill, up to 13 KB per thread at 160 dims."""
QUERY_BLOCK_SIZE = 128
"""Queries whose scores are written out at a time: memory grows with the row and not with its square."""


def attention(
    query: Float[Tensor, "rows queries num_heads head_dim"],
    key: Float[Tensor, "rows keys num_kv_heads head_dim"],
    value: Float[Tensor, "rows keys num_kv_heads head_dim"],
    *,
    scale: float,
    slopes: Float32[Tensor, " num_heads"] | Float32[Tensor, "rows num_heads"] | None,
    document_starts: Int32[Tensor, "rows keys"] | None,
) -> Float[Tensor, "rows queries num_heads head_dim"]:
    """Let every token attend to itself and the earlier tokens of its document; fp32 inside (fp64 for fp64), query's dtype out.

    Queries are the last of the keys' positions. Query head h reads key head h // (heads // num_kv_heads). The bias is added to
    the scaled scores and is not scaled itself. Each row may have its own slopes, which get no gradient; without `slopes` there
    is no bias. Token i sees keys starts[i] to i (`tandem.kernels.documents.document_starts`); without `document_starts` a row
    is one document.

    Raises: ValueError if there are more queries than keys, or the scale is not positive.
    Source: Press et al. 2022, "Train Short, Test Long", section 3; Ainslie et al. 2023, "GQA"; backward: Dao et al. 2022,
    "FlashAttention", appendix B.
    """
    queries, keys = query.shape[1], key.shape[1]
    if queries > keys:
        raise ValueError(
            f"{queries} queries of {keys} keys: queries are the last of the keys' positions; pass at most {keys}"
        )
    if not scale > 0:
        raise ValueError(f"scale {scale}: must be positive")
    if slopes is None and document_starts is None and queries == keys:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    out, _ = torch.ops.tandem.attention(query, key, value, scale, slopes, document_starts)
    return out


def alibi_slopes(num_heads: int) -> Float32[Tensor, " num_heads"]:
    """Return the slope of every head: 2^(-8/n), 2^(-16/n), ... for n heads, if n is a power of two.

    For other n: the slopes of the power of two below, then every second slope of the power of two above.
    Source: Press et al. 2022, section 3; for other n the authors' code, and Cerebras modelzoo `AlibiPositionEmbeddingLayer.py`.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * (index + 1) / count) for index in range(count)]

    return torch.tensor((geometric(power) + geometric(2 * power)[::2])[:num_heads], dtype=torch.float32)


def _eager_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the result, and the logarithm of each query's sum of exponentials [rows, heads, queries]."""
    out, lse = like(query), _empty_lse(query)
    num_kv_heads = key.shape[2]
    q, k, v = (_group_by_kv_head(x, num_kv_heads) for x in (query, key, value))
    for block, visible_keys in _query_blocks(query, key):
        scores = _scores(q[:, :, block], k[:, 0, visible_keys], scale, lse, slopes, starts)
        weights = scores.softmax(-1)
        # The largest weight is exp(largest score) / sum, and never small.
        lse[:, :, block] = scores.amax(-1).sub_(weights.amax(-1).log_())
        mixed = torch.bmm(weights.view(len(k), -1, visible_keys.stop), v[:, 0, visible_keys])
        out[:, block] = mixed.view(*scores.shape[:-1], -1).transpose(1, 2)
    return out, lse


_attention = torch.library.custom_op("tandem::attention", _eager_attention_forward, mutates_args=(), device_types="cpu")


@_attention.register_kernel("cuda")
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _needs_eager_attention(query, key):
        return _eager_attention_forward(query, key, value, scale, slopes, starts)
    from tandem.kernels.device import attention as device

    return device.forward(query, key, value, scale, slopes, starts)


@_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    return like(query), _empty_lse(query)


def _eager_attention_backward(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, slopes: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value."""
    q, k, v, dy, y = (_group_by_kv_head(x, key.shape[2]) for x in (query, key, value, out_gradient, out))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    gradients = like(query), like(key), like(value)
    for block, visible_keys in _query_blocks(query, key):
        scores = _scores(q[:, :, block], k[:, 0, visible_keys], scale, lse, slopes, starts)
        weights = scores.sub_(lse[:, :, block, None]).exp_().view(len(k), -1, visible_keys.stop)
        dy_block, q_block = dy[:, :, block].flatten(1, 2), q[:, :, block].flatten(1, 2)
        products = (dy_block * y[:, :, block].flatten(1, 2)).sum(-1, keepdim=True)
        ds = torch.bmm(dy_block, v[:, 0, visible_keys].transpose(1, 2)).sub_(products).mul_(weights)
        dv[:, 0, visible_keys].baddbmm_(weights.transpose(1, 2), dy_block)
        dk[:, 0, visible_keys].baddbmm_(ds.transpose(1, 2), q_block, alpha=scale)
        dq = torch.bmm(ds, k[:, 0, visible_keys]).mul_(scale)
        gradients[0][:, block] = dq.view(*scores.shape[:-1], -1).transpose(1, 2)
    for gradient, x in zip(gradients[1:], (dk, dv), strict=True):
        gradient.copy_(x.view(len(key), -1, *x.shape[2:]).transpose(1, 2))
    return gradients


_attention_backward = torch.library.custom_op(
    "tandem::attention_backward", _eager_attention_backward, mutates_args=(), device_types="cpu"
)


@_attention_backward.register_kernel("cuda")
def _(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, slopes: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _needs_eager_attention(query, key):
        return _eager_attention_backward(out_gradient, query, key, value, out, lse, scale, slopes, starts)
    from tandem.kernels.device import attention as device

    return device.backward(out_gradient, query, key, value, out, lse, scale, slopes, starts)


@_attention_backward.register_fake
def _(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, slopes: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return like(query), like(key), like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, slopes, starts = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, slopes, starts)


def _autograd_backward(ctx: Any, out_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *kept, slopes, starts = ctx.saved_tensors
    gradients = torch.ops.tandem.attention_backward(out_gradient, *kept, ctx.scale, slopes, starts)
    return *gradients, None, None, None


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def _needs_eager_attention(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel does not apply: a few queries, for which it would walk all tiles, fp64, or heads that are too wide."""
    few_queries, head_dim = query.shape[1] < key.shape[1], query.shape[-1]
    if query.dtype == torch.float32:
        return few_queries or head_dim not in FP32_HEAD_DIMS
    return few_queries or query.dtype == torch.float64 or head_dim > MAX_HEAD_DIM


def _empty_lse(query: Tensor) -> Tensor:
    rows, queries, heads, _ = query.shape
    return query.new_empty((rows, heads, queries), dtype=torch.promote_types(query.dtype, torch.float32))


def _group_by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Reshape to [rows * num_kv_heads, group, tokens, head_dim], in fp32 or fp64."""
    rows, tokens, heads, head_dim = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.transpose(1, 2).reshape(rows * num_kv_heads, heads // num_kv_heads, tokens, head_dim)


def _query_blocks(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """Return slices of the queries, each with the slice of the keys up to its last query."""
    queries, earlier = query.shape[1], key.shape[1] - query.shape[1]
    ends = [min(first + QUERY_BLOCK_SIZE, queries) for first in range(0, queries, QUERY_BLOCK_SIZE)]
    return [(slice(index * QUERY_BLOCK_SIZE, end), slice(0, earlier + end)) for index, end in enumerate(ends)]


def _scores(q: Tensor, k: Tensor, scale: float, lse: Tensor, slopes: Tensor | None, starts: Tensor | None) -> Tensor:
    """Return the scaled and biased scores [rows, heads, queries, keys]; minus infinity if the query does not see the key."""
    queries, keys = q.shape[2], k.shape[1]
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).mul_(scale).view(*lse.shape[:2], queries, keys)
    key_positions = torch.arange(keys, dtype=scores.dtype, device=k.device)
    distance = key_positions - key_positions[keys - queries :, None]
    masked = distance > 0
    if starts is not None:
        masked = masked | (key_positions < starts[:, None, keys - queries : keys, None])
    if slopes is not None:
        scores.addcmul_(slopes[..., None, None].to(scores.dtype), distance)
    return scores.masked_fill_(masked, -math.inf)
