"""Tiles of tokens by head dims, in two parts: the largest power of two in the head, and a tail of at least 16 dims.

Tensor cores multiply each part directly. Tokens may have any stride; dims are contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def _load_part(
    base, token, stride, seq, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr
):
    """Load tokens by `WIDTH` dims; zeros after the head and, if `RAGGED`, after the row."""
    dim = FIRST + tl.arange(0, WIDTH)
    place = base + token.to(tl.int64)[:, None] * stride + dim[None, :]
    if RAGGED:
        part = tl.load(place, mask=(token < seq)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif FIRST + WIDTH > HEAD_DIM:
        part = tl.load(place, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        part = tl.load(place)
    return part


@triton.jit
def load_tile(
    base, token, stride, seq,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Load both parts of the head. Without a tail the second is a placeholder."""
    main = _load_part(base, token, stride, seq, 0, MAIN, HEAD_DIM, RAGGED)
    tail = main
    if TAIL > 0:
        tail = _load_part(base, token, stride, seq, MAIN, TAIL, HEAD_DIM, RAGGED)
    return main, tail


@triton.jit
def load_per_token(base, token, seq, RAGGED: tl.constexpr):
    """Load one number for each token; zeros after the row if `RAGGED`."""
    return tl.load(base + token, mask=token < seq, other=0) if RAGGED else tl.load(base + token)


@triton.jit
def store_tile(
    base, token, stride, seq, main, tail, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    dim = tl.arange(0, MAIN)
    place = base + token.to(tl.int64)[:, None] * stride
    exists = (token < seq)[:, None]
    tl.store(place + dim[None, :], main.to(base.dtype.element_ty), mask=exists & (dim < HEAD_DIM)[None, :])
    if TAIL > 0:
        dim = MAIN + tl.arange(0, TAIL)
        tl.store(place + dim[None, :], tail.to(base.dtype.element_ty), mask=exists & (dim < HEAD_DIM)[None, :])


@triton.jit
def dot_transposed(a_main, a_tail, b_main, b_tail, TAIL: tl.constexpr):
    """Return a b^T over the head dims."""
    sums = tl.dot(a_main, tl.trans(b_main), input_precision="tf32x3")
    if TAIL > 0:
        sums = tl.dot(a_tail, tl.trans(b_tail), sums, input_precision="tf32x3")
    return sums


@triton.jit
def accumulate(main, tail, weights, b_main, b_tail, TAIL: tl.constexpr):
    """Return the sums plus weights b."""
    main = tl.dot(weights, b_main, main, input_precision="tf32x3")
    if TAIL > 0:
        tail = tl.dot(weights, b_tail, tail, input_precision="tf32x3")
    return main, tail


@triton.jit
def add_bias(score, slope, column):
    """Add slope * column by a fused multiply-add, which leaves no intermediate value for the compiler to keep in registers."""
    return tl.fma(tl.zeros_like(score) + slope, tl.broadcast_to(column, score.shape), score)


@triton.jit
def mask_scores(score, to, source, begin, DOCUMENTS: tl.constexpr):
    """Set the scores of keys that a query does not see to minus infinity. Positions are broadcast against the tile."""
    seen = source <= to.to(tl.float32)
    if DOCUMENTS:
        seen = seen & (source >= begin.to(tl.float32))
    return tl.where(seen, score, float("-inf"))
