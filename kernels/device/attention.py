"""Attention in tiles of queries by keys, whose scores never leave the multiprocessor.

    forward   m = max(m, s),  l = l * 2^(m_old - m) + rowsum(2^(s - m)),  y likewise;  lse = log of the sum, kept for backward
    backward  p = 2^(s - lse);  one kernel for dq, one for dk and dv. Both compute p and dp: seven products of a tile instead of
              five, but no two programs add to the same number, so there are no atomics whose order could change bits

* A head is multiplied in two parts, 80 = 64 + 16 and 160 = 128 + 32. A tile's width is a power of two, and three eighths of a
  tile of 128 or 256 would be zeros.
* A program walks the tiles of one block of queries in three stretches: tiles in which documents begin, whole tiles, tiles on
  the diagonal. Whole tiles need no mask. For dk and dv it walks the tiles of one block of keys in a single loop. Tiles above
  the diagonal or of other documents are skipped.
* The programs with the longest walk start first. Programs of several heads are interleaved, block by block, for as many heads
  as fit in the L2 cache.
* If there are few key heads, several programs share the query heads of one. Each writes its sums of dk and dv in fp32, and
  another kernel adds these in the order of the heads.
* The bias of key j is slope * (j - first key of the tile), small and different in each column, plus slope * (first key - i),
  one number per query. The latter is added to the query's maximum instead of its scores, which costs nothing. Neither is
  rounded more coarsely than slope * (j - i) itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.device.attention_tiling import num_heads_in_l2, num_heads_per_program, select_tile_config
from tandem.kernels.device.launch import launch
from tandem.kernels.device.launch import num_blocks as cover
from tandem.kernels.device.shared import like
from tandem.kernels.device.tiles import (
    accumulate,
    add_bias,
    dot_transposed,
    load_per_token,
    load_tile,
    mask_scores,
    store_tile,
)

LOWEST = tl.constexpr(-1e30)
"""Below any score but finite, so the difference of two is 0 and not NaN."""
HEADS_PER_SUM_PROGRAM = 16
"""Heads, of one token or several, that one program sums."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _program_indices(heads):
    """Return block, row and head of this program of `_grid`."""
    pair = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    return tl.program_id(1), (pair // heads).to(tl.int64), pair % heads


@triton.jit
def _load_slope(slopes, slopes_row, row, head, scale, ALIBI: tl.constexpr):
    """Return the slope relative to unscaled scores."""
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + row * slopes_row + head) / scale
    return slope


@triton.jit
def _key_loop_bounds(starts, first, seq, DOCUMENTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return where the walk over keys begins, where whole tiles begin, where it reaches the diagonal, and where it ends."""
    diagonal = first // KEYS * KEYS
    begin, whole = 0, 0
    if DOCUMENTS:
        begin = tl.load(starts + first) // KEYS * KEYS
        last = tl.minimum(first + QUERIES, seq) - 1
        whole = tl.minimum(tl.cdiv(tl.load(starts + last), KEYS) * KEYS, diagonal)
    return begin, whole, diagonal, tl.minimum(first + QUERIES, seq)


@triton.jit(do_not_specialize=["heads"])
def _forward(
    query, q_row, q_token, q_head, key, k_row, k_token, k_head, value, v_row, v_token, v_head, out, o_row, o_token, o_head,
    lse, slopes, slopes_row, starts, seq, heads, scale,
    GROUP: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, RAGGED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    along = tl.cdiv(seq, QUERIES)
    block, row, head = _program_indices(heads)
    first = (along - 1 - block) * QUERIES
    query += row * q_row + head * q_head
    key += row * k_row + head // GROUP * k_head
    value += row * v_row + head // GROUP * v_head
    starts += row * seq
    to = first + tl.arange(0, QUERIES)
    q_main, q_tail = load_tile(query, to, q_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
    begin = to
    if DOCUMENTS:
        begin = load_per_token(starts, to, seq, RAGGED)
    slope = _load_slope(slopes, slopes_row, row, head, scale, ALIBI)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    index = tl.arange(0, KEYS).to(tl.float32)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    tail = tl.zeros([QUERIES, TAIL if TAIL > 0 else 16], tl.float32)
    walk_begin, walk_whole, walk_diagonal, walk_end = _key_loop_bounds(starts, first, seq, DOCUMENTS, QUERIES, KEYS)
    for stretch in tl.static_range(0 if DOCUMENTS else 1, 3):
        low = walk_begin if stretch == 0 else (walk_whole if stretch == 1 else walk_diagonal)
        high = walk_whole if stretch == 0 else (walk_diagonal if stretch == 1 else walk_end)
        for step in tl.range(0, tl.cdiv(high - low, KEYS)):
            place = low + step * KEYS
            source = place + tl.arange(0, KEYS)
            k_main, k_tail = load_tile(key, source, k_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED and stretch == 2)
            v_main, v_tail = load_tile(value, source, v_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED and stretch == 2)
            score = dot_transposed(q_main, q_tail, k_main, k_tail, TAIL)
            shift = tl.zeros([QUERIES], tl.float32)
            if ALIBI:
                score = add_bias(score, slope, index[None, :])
                shift = slope * (place - to).to(tl.float32)
            if stretch != 1:
                score = mask_scores(score, (to - place)[:, None], index[None, :], (begin - place)[:, None], DOCUMENTS)
            higher = tl.maximum(highest, tl.max(score, 1) + shift)
            p = tl.exp2(score * (scale * LOG2_E) + ((shift - higher) * (scale * LOG2_E))[:, None])
            shrink = tl.exp2((highest - higher) * (scale * LOG2_E))
            total = total * shrink + tl.sum(p, 1)
            main *= shrink[:, None]
            if TAIL > 0:
                tail *= shrink[:, None]
            main, tail = accumulate(main, tail, p.to(value.dtype.element_ty), v_main, v_tail, TAIL)
            highest = higher
    tl.store(lse + (row * heads + head) * seq + to, highest * scale + tl.log(total), mask=to < seq)
    weight = (1.0 / total)[:, None]
    store_tile(out + row * o_row + head * o_head, to, o_token, seq, main * weight, tail * weight, HEAD_DIM, MAIN, TAIL)


@triton.jit(do_not_specialize=["heads"])
def _backward_queries(
    query, q_row, q_token, q_head, key, k_row, k_token, k_head, value, v_row, v_token, v_head, out, o_row, o_token, o_head,
    out_gradient, do_row, do_token, do_head, gradient, dq_row, dq_token, dq_head,
    lse, delta, slopes, slopes_row, starts, seq, heads, scale,
    GROUP: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, RAGGED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Also write rowsum(dy * y) to `delta`."""
    along = tl.cdiv(seq, QUERIES)
    block, row, head = _program_indices(heads)
    first = (along - 1 - block) * QUERIES
    key += row * k_row + head // GROUP * k_head
    value += row * v_row + head // GROUP * v_head
    starts += row * seq
    to = first + tl.arange(0, QUERIES)
    o_main, o_tail = load_tile(out + row * o_row + head * o_head, to, o_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
    do_main, do_tail = load_tile(
        out_gradient + row * do_row + head * do_head, to, do_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED
    )
    products = tl.sum(o_main.to(tl.float32) * do_main.to(tl.float32), 1)
    if TAIL > 0:
        products += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
    per_query = (row * heads + head) * seq + to
    tl.store(delta + per_query, products, mask=to < seq)
    log_total = load_per_token(lse + (row * heads + head) * seq, to, seq, RAGGED) * LOG2_E
    q_main, q_tail = load_tile(query + row * q_row + head * q_head, to, q_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
    begin = to
    if DOCUMENTS:
        begin = load_per_token(starts, to, seq, RAGGED)
    slope = _load_slope(slopes, slopes_row, row, head, scale, ALIBI)
    index = tl.arange(0, KEYS).to(tl.float32)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    tail = tl.zeros([QUERIES, TAIL if TAIL > 0 else 16], tl.float32)
    walk_begin, walk_whole, walk_diagonal, walk_end = _key_loop_bounds(starts, first, seq, DOCUMENTS, QUERIES, KEYS)
    for stretch in tl.static_range(0 if DOCUMENTS else 1, 3):
        low = walk_begin if stretch == 0 else (walk_whole if stretch == 1 else walk_diagonal)
        high = walk_whole if stretch == 0 else (walk_diagonal if stretch == 1 else walk_end)
        for step in tl.range(0, tl.cdiv(high - low, KEYS)):
            place = low + step * KEYS
            source = place + tl.arange(0, KEYS)
            k_main, k_tail = load_tile(key, source, k_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED and stretch == 2)
            v_main, v_tail = load_tile(value, source, v_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED and stretch == 2)
            score = dot_transposed(q_main, q_tail, k_main, k_tail, TAIL)
            shift = -log_total
            if ALIBI:
                score = add_bias(score, slope, index[None, :])
                shift += slope * (place - to).to(tl.float32) * (scale * LOG2_E)
            if stretch != 1:
                score = mask_scores(score, (to - place)[:, None], index[None, :], (begin - place)[:, None], DOCUMENTS)
            p = tl.exp2(score * (scale * LOG2_E) + shift[:, None])
            dp = dot_transposed(do_main, do_tail, v_main, v_tail, TAIL)
            ds = (p * (dp - products[:, None])).to(key.dtype.element_ty)
            main, tail = accumulate(main, tail, ds, k_main, k_tail, TAIL)
    gradient += row * dq_row + head * dq_head
    store_tile(gradient, to, dq_token, seq, main * scale, tail * scale, HEAD_DIM, MAIN, TAIL)


@triton.jit(do_not_specialize=["num_kv_heads"])
def _backward_keys(
    query, q_row, q_token, q_head, key, k_row, k_token, k_head, value, v_row, v_token, v_head,
    out_gradient, do_row, do_token, do_head, key_gradient, dk_row, dk_token, dk_head, value_gradient, dv_row, dv_token, dv_head,
    lse, delta, slopes, slopes_row, starts, ends, seq, num_kv_heads, scale,
    HEADS_PER_PROGRAM: tl.constexpr, GROUP: tl.constexpr, ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, RAGGED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sum over `HEADS_PER_PROGRAM` query heads. If a key head has more, the gradients have a slot for the sums of each program.

    `ends` [rows, 2, blocks of keys]: the end of the queries that see the block's first key, and of those that see any of its
    keys.
    """
    along = tl.cdiv(seq, KEYS)
    block, row, part = _program_indices(num_kv_heads * (GROUP // HEADS_PER_PROGRAM))
    kv_head = part // (GROUP // HEADS_PER_PROGRAM)
    first = block * KEYS
    starts += row * seq
    source = first + tl.arange(0, KEYS)
    k_main, k_tail = load_tile(key + row * k_row + kv_head * k_head, source, k_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
    v_main, v_tail = load_tile(
        value + row * v_row + kv_head * v_head, source, v_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED
    )
    index = tl.arange(0, KEYS).to(tl.float32)
    dk_main = tl.zeros([KEYS, MAIN], tl.float32)
    dk_tail = tl.zeros([KEYS, TAIL if TAIL > 0 else 16], tl.float32)
    dv_main = tl.zeros([KEYS, MAIN], tl.float32)
    dv_tail = tl.zeros([KEYS, TAIL if TAIL > 0 else 16], tl.float32)
    whole_until, walk_end = seq, seq
    if DOCUMENTS:
        whole_until = tl.load(ends + (row * 2) * along + block)
        walk_end = tl.load(ends + (row * 2 + 1) * along + block)
    walk_begin = first // QUERIES * QUERIES
    walk_whole = tl.minimum(tl.cdiv(first + KEYS, QUERIES) * QUERIES, walk_end)
    walk_mixed = tl.maximum(whole_until // QUERIES * QUERIES, walk_whole)
    steps = tl.cdiv(walk_end - walk_begin, QUERIES)
    # One loop over all tiles of all its heads. With several loops in a row the ptxas of triton 3.6 makes every product wait
    # for the previous one (its note C7515); an outer loop would fill registers with the values it keeps for each start.
    for step in tl.range(0, HEADS_PER_PROGRAM * steps):
        place, head = walk_begin + step * QUERIES, part
        if GROUP > 1:  # with one head per program too: otherwise more values live outside the loop than registers hold
            place, head = walk_begin + step % steps * QUERIES, part * HEADS_PER_PROGRAM + step // steps
        q_base = query + row * q_row + head * q_head
        do_base = out_gradient + row * do_row + head * do_head
        per_query = (row * (num_kv_heads * GROUP) + head) * seq
        slope = _load_slope(slopes, slopes_row, row, head, scale, ALIBI)
        to = place + tl.arange(0, QUERIES)
        q_main, q_tail = load_tile(q_base, to, q_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
        do_main, do_tail = load_tile(do_base, to, do_token, seq, HEAD_DIM, MAIN, TAIL, RAGGED)
        log_total = load_per_token(lse + per_query, to, seq, RAGGED)
        products = load_per_token(delta + per_query, to, seq, RAGGED)
        begin = to
        if DOCUMENTS:
            begin = load_per_token(starts, to, seq, RAGGED)
        score = dot_transposed(k_main, k_tail, q_main, q_tail, TAIL)
        shift = -log_total * LOG2_E
        if ALIBI:
            score = add_bias(score, slope, index[:, None])
            shift += slope * (first - to).to(tl.float32) * (scale * LOG2_E)
        if (place < walk_whole) | (place >= walk_mixed):
            score = mask_scores(score, (to - first)[None, :], index[:, None], (begin - first)[None, :], DOCUMENTS)
        p = tl.exp2(score * (scale * LOG2_E) + shift[None, :])
        dv_main, dv_tail = accumulate(dv_main, dv_tail, p.to(query.dtype.element_ty), do_main, do_tail, TAIL)
        dp = dot_transposed(v_main, v_tail, do_main, do_tail, TAIL)
        ds = (p * (dp - products[None, :])).to(query.dtype.element_ty)
        dk_main, dk_tail = accumulate(dk_main, dk_tail, ds, q_main, q_tail, TAIL)
    key_gradient += row * dk_row + part * dk_head
    value_gradient += row * dv_row + part * dv_head
    store_tile(key_gradient, source, dk_token, seq, dk_main * scale, dk_tail * scale, HEAD_DIM, MAIN, TAIL)
    store_tile(value_gradient, source, dv_token, seq, dv_main, dv_tail, HEAD_DIM, MAIN, TAIL)


@triton.jit(do_not_specialize=["count"])
def _sum_parts(
    key_parts, value_parts, key_gradient, value_gradient, count,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of each of `count` heads of all tokens, which are side by side, from the first on."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    for gradient in tl.static_range(0, 2):
        parts = key_parts if gradient == 0 else value_parts
        main, tail = load_tile(parts, head, PARTS * HEAD_DIM, count, HEAD_DIM, MAIN, TAIL, True)
        for part in tl.static_range(1, PARTS):
            more = load_tile(parts + part * HEAD_DIM, head, PARTS * HEAD_DIM, count, HEAD_DIM, MAIN, TAIL, True)
            main, tail = main + more[0], tail + more[1]
        target = key_gradient if gradient == 0 else value_gradient
        store_tile(target, head, HEAD_DIM, count, main, tail, HEAD_DIM, MAIN, TAIL)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None, document_starts: Tensor | None,
    *, tile_config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the result [rows, seq, heads, head_dim], tokens outermost in memory, and each sum's log [rows, heads, seq]."""
    rows, seq, heads, _ = query.shape
    query, key, value = _contiguous_head_dim(query), _contiguous_head_dim(key), _contiguous_head_dim(value)
    out, lse = like(query), query.new_empty((rows, heads, seq), dtype=torch.float32)
    tile_config = tile_config or select_tile_config("forward", query)
    max_interleaved = num_heads_in_l2(key, heads // key.shape[2])
    launch(
        _forward, _grid(rows * heads, cover(seq, tile_config["QUERIES"]), max_interleaved, tile_config),
        *_with_strides(query, key, value, out), lse,
        *_slopes_with_stride(slopes, lse), lse if document_starts is None else document_starts.contiguous(),
        seq, heads, scale,
        **_shape_constants(query, key, slopes, document_starts), **_compile_constants(seq, tile_config),
    )  # fmt: skip
    return out, lse


def backward(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, slopes: Tensor | None, document_starts: Tensor | None,
    *, query_tile_config: dict[str, int] | None = None, key_tile_config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, tokens outermost in memory."""
    inputs, settings = (out_gradient, query, key, value), (scale, slopes, document_starts)
    query_gradient, delta = backward_query(*inputs, out, lse, *settings, tile_config=query_tile_config)
    return query_gradient, *backward_key_value(*inputs, lse, delta, *settings, tile_config=key_tile_config)


def backward_query(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    scale: float, slopes: Tensor | None, document_starts: Tensor | None, *, tile_config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of query, and rowsum(dy * y) [rows, heads, seq]."""
    rows, seq, heads, _ = query.shape
    query, key, value, out_gradient = (_contiguous_head_dim(x) for x in (query, key, value, out_gradient))
    gradient, delta = like(query), torch.empty_like(lse)
    tile_config = tile_config or select_tile_config("queries", query)
    max_interleaved = num_heads_in_l2(key, heads // key.shape[2])
    launch(
        _backward_queries, _grid(rows * heads, cover(seq, tile_config["QUERIES"]), max_interleaved, tile_config),
        *_with_strides(query, key, value, out, out_gradient, gradient), lse, delta,
        *_slopes_with_stride(slopes, lse), lse if document_starts is None else document_starts.contiguous(),
        seq, heads, scale,
        **_shape_constants(query, key, slopes, document_starts), **_compile_constants(seq, tile_config),
    )  # fmt: skip
    return gradient, delta


def backward_key_value(
    out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    scale: float, slopes: Tensor | None, document_starts: Tensor | None, *, tile_config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of key and value, given `delta` from `backward_query`.

    If several programs share the query heads of a key head, their sums take 8 * head_dim bytes per token and program.
    """
    rows, seq, heads, _ = query.shape
    num_kv_heads = key.shape[2]
    query, key, value, out_gradient = (_contiguous_head_dim(x) for x in (query, key, value, out_gradient))
    tile_config = tile_config or select_tile_config("keys", query)
    blocks = cover(seq, tile_config["KEYS"])
    heads_per_program = num_heads_per_program(blocks * rows * num_kv_heads, heads // num_kv_heads)
    tile_config = {"HEADS_PER_PROGRAM": heads_per_program} | tile_config
    gradients = like(key), like(value)
    num_part_heads = heads // tile_config["HEADS_PER_PROGRAM"]
    parts = gradients
    if num_part_heads > num_kv_heads:
        parts = _empty_fp32_parts(key, num_part_heads), _empty_fp32_parts(value, num_part_heads)
    starts_or_placeholder = lse if document_starts is None else document_starts.contiguous()
    ends = lse if document_starts is None else _visible_query_ends(starts_or_placeholder, tile_config["KEYS"])
    constants = _shape_constants(query, key, slopes, document_starts)
    launch(
        _backward_keys, _grid(rows * num_part_heads, blocks, num_heads_in_l2(query), tile_config),
        *_with_strides(query, key, value, out_gradient, *parts), lse, delta,
        *_slopes_with_stride(slopes, lse), starts_or_placeholder, ends, seq, num_kv_heads, scale,
        **constants, **_compile_constants(seq, tile_config),
    )  # fmt: skip
    if num_part_heads > num_kv_heads:
        count = rows * seq * num_kv_heads
        head_constants = {name: constants[name] for name in ("HEAD_DIM", "MAIN", "TAIL")}
        launch(
            _sum_parts, (cover(count, HEADS_PER_SUM_PROGRAM),), *parts, *gradients, count,
            PARTS=num_part_heads // num_kv_heads, HEADS=HEADS_PER_SUM_PROGRAM, **head_constants,
        )  # fmt: skip
    return gradients


def _visible_query_ends(document_starts: Tensor, key_block_size: int) -> Tensor:
    """Return, for every block of keys, how many queries' documents start no later than its first key, and than its last."""
    rows, seq = document_starts.shape
    first = torch.arange(0, seq, key_block_size, dtype=document_starts.dtype, device=document_starts.device)
    bounds = torch.cat((first, first + (key_block_size - 1)))
    ends = torch.searchsorted(document_starts, bounds.repeat(rows, 1), right=True, out_int32=True)
    return ends.view(rows, 2, len(first))


def _grid(
    num_row_heads: int, num_blocks_per_head: int, max_interleaved: int, tile_config: dict[str, int]
) -> tuple[int, int, int]:
    """Return the grid. Programs start block by block for a group of (row, head) pairs, then for the next group.

    A group has the most pairs that divide all pairs evenly and are at most `heads_in_l2` of `tile_config`, or
    `max_interleaved`.
    """
    max_interleaved = min(tile_config.get("heads_in_l2", max_interleaved), num_row_heads)
    num_interleaved = next((count for count in range(max_interleaved, 1, -1) if num_row_heads % count == 0), 1)
    return num_interleaved, num_blocks_per_head, num_row_heads // num_interleaved


def _compile_constants(seq: int, tile_config: dict[str, int]) -> dict[str, Any]:
    constants = {name: value for name, value in tile_config.items() if name != "heads_in_l2"}
    return {"RAGGED": seq % max(tile_config["QUERIES"], tile_config["KEYS"]) > 0, **constants}


def _shape_constants(
    query: Tensor, key: Tensor, slopes: Tensor | None, document_starts: Tensor | None
) -> dict[str, Any]:
    head_dim = query.shape[-1]
    main = max(16, 1 << (head_dim.bit_length() - 1))
    tail = head_dim - main
    return {
        "GROUP": query.shape[2] // key.shape[2], "ALIBI": slopes is not None, "DOCUMENTS": document_starts is not None,
        "HEAD_DIM": head_dim, "MAIN": main, "TAIL": max(16, triton.next_power_of_2(tail)) if tail > 0 else 0,
    }  # fmt: skip


def _empty_fp32_parts(x: Tensor, num_heads: int) -> Tensor:
    """Return an empty fp32 tensor with `num_heads` heads, tokens outermost in memory."""
    rows, seq, _, head_dim = x.shape
    return x.new_empty((seq, rows, num_heads, head_dim), dtype=torch.float32).transpose(0, 1)


def _slopes_with_stride(slopes: Tensor | None, placeholder: Tensor) -> tuple[Tensor, int]:
    """Return slopes and the stride of their rows."""
    if slopes is None:
        return placeholder, 0
    slopes = slopes.contiguous()
    return slopes, slopes.stride(0) if slopes.dim() == 2 else 0


def _with_strides(*tensors: Tensor) -> list[Tensor | int]:
    """Return each tensor, followed by its strides of rows, tokens and heads."""
    return [item for x in tensors for item in (x, x.stride(0), x.stride(1), x.stride(2))]


def _contiguous_head_dim(x: Tensor) -> Tensor:
    """Return x with contiguous head dims, without a copy if it has them."""
    return x if x.stride(-1) == 1 else x.contiguous()
