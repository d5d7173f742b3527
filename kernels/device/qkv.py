"""Normalize and rotate the heads of a fused projection; each program computes one head of some neighbouring tokens.

A head is a tuple of parts: the first half of its rotated dims, the second half, and the rest in pieces of 32 columns. Both dims
of a pair are then in one thread, and no dim is read twice. head_dim 160 = 20 + 20 + 4 * 30 leaves 17 % of the lanes idle; a
block of 256 columns would leave 37 % idle and read partners twice. Four threads hold the same tokens of every part, so a mean
needs an exchange among these only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.device.launch import launch, num_blocks

REST_BLOCK_SIZE = tl.constexpr(32)
BLOCK_PAIRS = 1024
"""Pairs in a block of tokens: eight per thread. A thread's load is then 16 bytes of every part that is so aligned; halves of
20 dims are aligned to 8."""
NORM_BACKWARD_BLOCK_PAIRS = 512
"""A thread's load is 8 bytes of every part. Three heads are held at once, so 16 bytes would take 234 registers instead of 128,
for half the warps and the same bytes in flight."""
PARTIAL_SUM_TOKENS = 128
"""Tokens in one partial sum of the weights' gradients, which adds 1 % to the bytes that backward moves. A block has no more
tokens than this: otherwise the rest of the heads would take more than 64 registers."""
NUM_WARPS = 4


@triton.jit
def _part_columns(index: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the columns of a part of a head, and which of them exist."""
    if index < 2:
        column = index * HALF + tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        exists = column < (index + 1) * HALF
    else:
        column = 2 * HALF + (index - 2) * REST_BLOCK_SIZE + tl.arange(0, REST_BLOCK_SIZE)[None, :]
        exists = column < HEAD_DIM
    return column, exists


@triton.jit
def _append(parts, part):
    parts += (part,)
    return parts


@triton.jit
def _load_head(source, exists, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load the heads at `source` [tokens, 1] in fp32; zero if masked."""
    head = ()
    for index in tl.static_range(2 + triton.cdiv(HEAD_DIM - 2 * HALF, REST_BLOCK_SIZE)):
        column, inside = _part_columns(index, HALF, HEAD_DIM)
        head = _append(head, tl.load(source + column, mask=exists & inside, other=0.0).to(tl.float32))
    return head


@triton.jit
def _store_head(target, exists, head, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    for index in tl.static_range(len(head)):
        column, inside = _part_columns(index, HALF, HEAD_DIM)
        tl.store(target + column, head[index].to(target.dtype.element_ty), mask=exists & inside)


@triton.jit
def _multiply(head, factors):
    product = ()
    for index in tl.static_range(len(head)):
        product = _append(product, head[index] * factors[index])
    return product


@triton.jit
def _add(head, sums):
    total = ()
    for index in tl.static_range(len(head)):
        total = _append(total, head[index] + sums[index])
    return total


@triton.jit
def _head_mean(head, HEAD_DIM: tl.constexpr):
    """Return the mean over all dims, [tokens, 1]."""
    total = tl.sum(head[0] + head[1], axis=1)
    if len(head) > 2:
        rest = head[2]
        for index in tl.static_range(3, len(head)):
            rest += head[index]
        total += tl.sum(rest, axis=1)
    return (total / HEAD_DIM)[:, None]


@triton.jit
def _normalize(head, epsilon, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return heads with mean 0 and variance 1, and the reciprocal of their standard deviation."""
    mean = _head_mean(head, HEAD_DIM)
    centred = ()
    for index in tl.static_range(len(head)):
        _, inside = _part_columns(index, HALF, HEAD_DIM)
        centred = _append(centred, tl.where(inside, head[index] - mean, 0.0))
    scale = tl.rsqrt(_head_mean(_multiply(centred, centred), HEAD_DIM) + epsilon)
    normal = ()
    for index in tl.static_range(len(head)):
        normal = _append(normal, centred[index] * scale)
    return normal, scale


@triton.jit
def _normalize_backward(gradient, normal, scale, HEAD_DIM: tl.constexpr):
    """Return the gradient of the norm's input: remove the mean of the gradient and its component along the normalized head."""
    mean, along = _head_mean(gradient, HEAD_DIM), _head_mean(_multiply(gradient, normal), HEAD_DIM)
    result = ()
    for index in tl.static_range(len(gradient)):
        result = _append(result, (gradient[index] - mean - normal[index] * along) * scale)
    return result


@triton.jit
def _apply_rotary(head, cos, sin):
    turned = (head[0] * cos - head[1] * sin, head[1] * cos + head[0] * sin)
    turned += head[2:]
    return turned


@triton.jit
def _load_cos_sin(cos, sin, row, exists, HALF: tl.constexpr):
    pair, inside = _part_columns(0, HALF, 2 * HALF)
    at = row * HALF + pair
    return tl.load(cos + at, mask=exists & inside, other=0.0), tl.load(sin + at, mask=exists & inside, other=0.0)


@triton.jit
def _token_indices(block, rows, seq, table_tokens, TOKENS: tl.constexpr):
    """Return the indices of a block's tokens [TOKENS, 1] in [rows, seq], in [seq, rows] and in the table, and which exist."""
    token = (block * TOKENS + tl.arange(0, TOKENS))[:, None]
    fused = token % seq * rows + token // seq
    return token.to(tl.int64), fused.to(tl.int64), token % table_tokens, token < rows * seq


@triton.jit
def _head_location(slot, query, key, value, QUERIES: tl.constexpr, KV_HEADS: tl.constexpr):
    """Where the slot-th head of the fused buffer belongs: the tensor, the heads of a token there, its number among them."""
    group, member = slot // (QUERIES + 2), slot % (QUERIES + 2)
    if_not_query = tl.where(member == QUERIES, key, value)
    is_query = member < QUERIES
    heads = tl.where(is_query, KV_HEADS * QUERIES, KV_HEADS)
    return tl.where(is_query, query, if_not_query), heads, tl.where(is_query, group * QUERIES + member, group)


@triton.jit
def _forward(
    qkv, cos, sin, query_norm, key_norm, query, key, value,
    rows, seq, table_tokens, epsilon,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, NORMED: tl.constexpr,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = KV_HEADS * (QUERIES + 2)
    slot, block = tl.program_id(0) % SLOTS, tl.program_id(0) // SLOTS
    member = slot % (QUERIES + 2)
    owner, heads, number = _head_location(slot, query, key, value, QUERIES, KV_HEADS)
    token, fused, angle, exists = _token_indices(block, rows, seq, table_tokens, TOKENS)
    head = _load_head(qkv + (fused * SLOTS + slot) * HEAD_DIM, exists, HALF, HEAD_DIM)
    if member <= QUERIES:
        if NORMED:
            # The same address for every token, written as a block, so that the weight has the layout of the heads.
            weight = tl.where(member < QUERIES, query_norm, key_norm) + number * HEAD_DIM + 0 * angle
            head, _ = _normalize(head, epsilon, HALF, HEAD_DIM)
            head = _multiply(head, _load_head(weight, exists, HALF, HEAD_DIM))
        x, y = _load_cos_sin(cos, sin, angle, exists, HALF)
        head = _apply_rotary(head, x, y)
    _store_head(owner + (token * heads + number) * HEAD_DIM, exists, head, HALF, HEAD_DIM)


@triton.jit
def _backward(
    query, key, value, qkv, cos, sin, query_norm, key_norm, gradient, partial,
    rows, seq, table_tokens, epsilon,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, NORMED: tl.constexpr,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = KV_HEADS * (QUERIES + 2)
    slot, chunk = tl.program_id(0) % SLOTS, tl.program_id(0) // SLOTS
    member = slot % (QUERIES + 2)
    owner, heads, number = _head_location(slot, query, key, value, QUERIES, KV_HEADS)
    sums = ()
    for index in tl.static_range(2 + triton.cdiv(HEAD_DIM - 2 * HALF, REST_BLOCK_SIZE)):
        column, _ = _part_columns(index, HALF, HEAD_DIM)
        sums = _append(sums, tl.zeros([TOKENS, column.shape[1]], tl.float32))
    for step in range(STEPS):
        token, fused, angle, exists = _token_indices(chunk * STEPS + step, rows, seq, table_tokens, TOKENS)
        at = (fused * SLOTS + slot) * HEAD_DIM
        head = _load_head(owner + (token * heads + number) * HEAD_DIM, exists, HALF, HEAD_DIM)
        if member <= QUERIES:
            x, y = _load_cos_sin(cos, sin, angle, exists, HALF)
            head = _apply_rotary(head, x, -y)
            if NORMED:
                normal, scale = _normalize(_load_head(qkv + at, exists, HALF, HEAD_DIM), epsilon, HALF, HEAD_DIM)
                sums = _add(sums, _multiply(head, normal))
                weight = tl.where(member < QUERIES, query_norm, key_norm) + number * HEAD_DIM + 0 * angle
                head = _multiply(head, _load_head(weight, exists, HALF, HEAD_DIM))
                head = _normalize_backward(head, normal, scale, HEAD_DIM)
        _store_head(gradient + at, exists, head, HALF, HEAD_DIM)
    if NORMED:
        row = chunk * KV_HEADS * (QUERIES + 1) + number + tl.where(member < QUERIES, 0, KV_HEADS * QUERIES)
        if member <= QUERIES:
            for index in tl.static_range(len(sums)):
                column, inside = _part_columns(index, HALF, HEAD_DIM)
                tl.store(partial + row * HEAD_DIM + column, tl.sum(sums[index], axis=0)[None, :], mask=inside)


def forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None,
    norm_eps: float, head_dim: int, num_queries_per_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return queries and keys, normalized if there are weights and then rotated, and values; each contiguous."""
    seq, rows, width = qkv.shape
    num_kv_heads, tokens = width // head_dim // (num_queries_per_kv + 2), _tokens_per_block(BLOCK_PAIRS, cos)
    query = qkv.new_empty(rows, seq, num_kv_heads * num_queries_per_kv, head_dim)
    key, value = (qkv.new_empty(rows, seq, num_kv_heads, head_dim) for _ in range(2))
    launch(
        _forward, (num_blocks(rows * seq, tokens) * num_kv_heads * (num_queries_per_kv + 2),),
        *_contiguous(qkv, cos, sin, query_norm, key_norm), query, key, value, rows, seq, len(cos) * seq, norm_eps,
        QUERIES=num_queries_per_kv, KV_HEADS=num_kv_heads, NORMED=query_norm is not None,
        HALF=cos.shape[-1], HEAD_DIM=head_dim, TOKENS=tokens, num_warps=NUM_WARPS,
    )  # fmt: skip
    return query, key, value


def backward(
    query: Tensor, key: Tensor, value: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    query_norm: Tensor | None, key_norm: Tensor | None, norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the fused buffer and of the norms' weights, given those of queries, keys and values.

    The former is contiguous. The latter are fp32, the query norm's first, and empty without norms.
    """
    rows, seq, num_kv_heads, head_dim = key.shape
    num_queries_per_kv = query.shape[2] // num_kv_heads
    tokens, steps, num_sums = _tokens_per_block(BLOCK_PAIRS, cos), 1, 0
    if query_norm is not None:
        tokens = _tokens_per_block(NORM_BACKWARD_BLOCK_PAIRS, cos)
        steps = min(PARTIAL_SUM_TOKENS // tokens, max(1, num_blocks(rows * seq, tokens)))
        num_sums = num_blocks(rows * seq, tokens * steps)
    gradient = key.new_empty(seq, rows, num_kv_heads * (num_queries_per_kv + 2) * head_dim)
    partial = key.new_empty(num_sums, num_kv_heads * (num_queries_per_kv + 1), head_dim, dtype=torch.float32)
    launch(
        _backward, (num_blocks(rows * seq, tokens * steps) * num_kv_heads * (num_queries_per_kv + 2),),
        *_contiguous(query, key, value, qkv, cos, sin, query_norm, key_norm), gradient, partial,
        rows, seq, len(cos) * seq, norm_eps,
        QUERIES=num_queries_per_kv, KV_HEADS=num_kv_heads, NORMED=query_norm is not None,
        HALF=cos.shape[-1], HEAD_DIM=head_dim, TOKENS=tokens, STEPS=steps, num_warps=NUM_WARPS,
    )  # fmt: skip
    return gradient, partial.view(0) if query_norm is None else partial.sum(0)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _tokens_per_block(num_pairs: int, cos: Tensor) -> int:
    return min(num_pairs // triton.next_power_of_2(cos.shape[-1]), PARTIAL_SUM_TOKENS)
