"""Attention over [rows, seq, heads, head_dim], causal, with linear biases or within documents where the shape has them.

Rivals that know neither run the shape without, as the speed such a shape can have at all; their rates count the work that
they do then.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tandem.kernels.bench.documents import documents, lengths, starts
from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Refused,
    Rival,
    Work,
    at_least_fp32,
    leaf,
    values,
)
from tandem.kernels.bench.shapes import FLASH_HEADS, FP32_HEADS, SMALL_MODELS, Heads, heads


def _example(shape: Heads, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    sizes = [
        (shape.rows, shape.tokens, count, shape.head_dim) for count in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    inputs = tuple(leaf(size, device, dtype, generator) for size in sizes)
    return Example(inputs, (values(sizes[0], device, dtype, generator),))


def _forward(shape: Heads, element_bytes: int) -> Work:
    """Queries, keys and values in, the result and a number for each query out: two products over the pairs that are seen."""
    flops = 4 * _pairs(shape) * shape.heads * shape.head_dim
    return Work(_elements(shape, 2, 2) * element_bytes + _statistics_bytes(shape), flops, flops)


def _backward(shape: Heads, element_bytes: int) -> Work:
    """These five and a gradient in, three gradients out: four products, five with the scores once more."""
    flops = 8 * _pairs(shape) * shape.heads * shape.head_dim
    return Work(_elements(shape, 4, 4) * element_bytes + _statistics_bytes(shape), flops, flops * 5 // 4)


def _pairs(shape: Heads) -> int:
    """Queries and keys that see each other."""
    return sum(length * (length + 1) // 2 for row in lengths(shape) for length in row)


def _elements(shape: Heads, queries: int, keys: int) -> int:
    return shape.rows * shape.tokens * shape.head_dim * (queries * shape.heads + keys * shape.kv_heads)


def _statistics_bytes(shape: Heads) -> int:
    return 4 * shape.rows * shape.tokens * shape.heads


def _slopes(shape: Heads, device: torch.device) -> Tensor | None:
    from tandem.kernels.attention import alibi_slopes

    return alibi_slopes(shape.heads).to(device) if shape.alibi else None


def _once(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
    """What the layers of a model share is made by the first of them."""
    return functools.lru_cache(maxsize=1)(make)


def _ours(shape: Heads) -> Function:
    from tandem.kernels.attention import attention

    slopes = _once(lambda device: _slopes(shape, device))
    begin = _once(lambda device: starts(shape, device))
    return lambda q, k, v: attention(q, k, v, scale=shape.scale, slopes=slopes(q.device), starts=begin(q.device))


def _our_kernel(shape: Heads) -> Function:
    """Where attention is SDPA's, as there is nothing that SDPA would not do."""
    import tandem.kernels.attention

    assert tandem.kernels.attention
    if shape.alibi or shape.documents:
        raise Refused("biases or documents: ours is this kernel already")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise Refused("needs a GPU")  # elsewhere the operation is no kernel
        return torch.ops.tandem.attention(q, k, v, shape.scale, None, None)[0]

    return kernel


def _flex_flash(shape: Heads) -> Function:
    """Of FlashAttention 4, whose package without CuTe torch would refuse in the middle of compiling."""
    import flash_attn.cute

    assert flash_attn.cute
    return _flex(shape, "FLASH")


def _flex(shape: Heads, backend: str = "TRITON") -> Function:
    flex: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @_once
    def arguments(device: torch.device) -> dict[str, Any]:
        slopes, apart = _slopes(shape, device), documents(shape, device)

        def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query - key).abs()  # type: ignore[index]

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key if apart is None else (query >= key) & (apart[row, query] == apart[row, key])

        rows = None if apart is None else shape.rows
        mask = create_block_mask(seen, rows, None, shape.tokens, shape.tokens, device=device)
        return {
            "score_mod": biased if shape.alibi else None,
            "block_mask": mask,
            "scale": shape.scale,
            "enable_gqa": True,
            "kernel_options": {"BACKEND": backend},
        }

    return lambda q, k, v: _by_heads(flex, q, k, v, **arguments(q.device))


def _written_out(shape: Heads) -> Function:
    @_once
    def mask(device: torch.device) -> Tensor:
        index = torch.arange(shape.tokens, device=device)
        distance = index[:, None] - index
        seen, apart, slopes = (distance >= 0)[None, None], documents(shape, device), _slopes(shape, device)
        if apart is not None:
            seen = seen & (apart[:, None, :, None] == apart[:, None, None, :])
        if slopes is None:
            return seen
        # SDPA's kernels take a bias in the queries' dtype alone; made by heads, as all of them in fp32 would not fit.
        heads = [(-slope * distance).to(shape.dtype) for slope in slopes]
        return torch.stack(heads)[None].masked_fill_(~seen, -torch.inf)

    scaled = functools.partial(
        F.scaled_dot_product_attention, scale=shape.scale, enable_gqa=shape.heads > shape.kv_heads
    )
    return lambda q, k, v: _by_heads(scaled, q, k, v, attn_mask=mask(q.device))


def _plain(shape: Heads) -> Function:
    """Scores written out: products in the inputs' dtype, biases and softmax in fp32. For one head of keys at a time.

    SDPA takes biases in the inputs' dtype, and bf16 rounds those of far keys by more than it rounds their weights.
    """

    @_once
    def known(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        place = torch.arange(shape.tokens, device=device)
        distance, apart = place[:, None] - place, documents(shape, device)
        unseen = (distance < 0)[None, None]
        if apart is not None:
            unseen = unseen | (apart[:, None, :, None] != apart[:, None, None, :])
        return distance, unseen, _slopes(shape, device)

    def one(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, distance: Tensor, unseen: Tensor) -> Tensor:
        scores = shape.scale * at_least_fp32(q @ k.mT)
        if slopes is not None:
            scores = scores - slopes.to(scores.dtype)[:, None, None] * distance
        return scores.masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype) @ v

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance, unseen, slopes = known(q.device)
        group = shape.heads // shape.kv_heads
        parts = (x.transpose(1, 2).split(size, 1) for x, size in ((q, group), (k, 1), (v, 1)))
        of_heads = [None] * shape.kv_heads if slopes is None else slopes.split(group)
        heads = [
            checkpoint(one, *part, distance, unseen, use_reentrant=False) for part in zip(*parts, of_heads, strict=True)
        ]
        return torch.cat(heads, 1).transpose(1, 2)

    return attended


def _sdpa(backend: SDPBackend) -> Callable[[Heads], Function]:
    def function(shape: Heads) -> Function:
        gqa = shape.heads > shape.kv_heads
        scaled = functools.partial(F.scaled_dot_product_attention, is_causal=True, scale=shape.scale, enable_gqa=gqa)

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _by_heads(scaled, q, k, v)

        return causal

    return function


def _flash(shape: Heads) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if not shape.documents:
        slopes = _once(lambda device: _slopes(shape, device))
        common = {"softmax_scale": shape.scale, "causal": True}
        return lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=slopes(q.device), **common)
    longest, ends = _packed(shape)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed, bounds = (x.flatten(0, 1) for x in (q, k, v)), ends(q.device)
        options = {"softmax_scale": shape.scale, "causal": True}
        return flash_attn_varlen_func(*packed, bounds, bounds, longest, longest, **options).view_as(q)

    return varlen


def _varlen(shape: Heads) -> Function:
    """Torch's own, of the FlashAttention that SDPA has."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    if shape.alibi:
        raise Refused("varlen_attn has no biases")
    if not shape.documents:
        raise Refused("without documents varlen_attn is the kernel of sdpa flash")
    longest, ends = _packed(shape)
    options: dict[str, Any] = {"scale": shape.scale, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(attend).parameters:  # torch 2.11 takes groups unasked
        options["enable_gqa"] = shape.heads > shape.kv_heads

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, bounds = (x.flatten(0, 1) for x in (q, k, v)), ends(q.device)
        return attend(*rows, bounds, bounds, longest, longest, **options).view_as(q)

    return packed


def _packed(shape: Heads) -> tuple[int, Callable[[torch.device], Tensor]]:
    """Tokens of the longest document; where documents end once rows lie behind one another, from 0 on."""
    flat = [length for row in lengths(shape) for length in row]
    return max(flat), _once(lambda device: torch.tensor([0, *flat], device=device).cumsum(0).int())


def _launches(shape: Heads) -> None:
    from tandem.kernels.device import attention as device

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    query, key, value = (
        empty(shape.rows, shape.tokens, n, shape.head_dim) for n in (shape.heads, *[shape.kv_heads] * 2)
    )
    slopes = empty(shape.heads, dtype=torch.float32) if shape.alibi else None
    begin = empty(shape.rows, shape.tokens, dtype=torch.int32) if shape.documents else None
    out, statistics = device.forward(query, key, value, shape.scale, slopes, begin)
    device.backward(out, query, key, value, out, statistics, shape.scale, slopes, begin)


def _by_heads(function: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **arguments).transpose(1, 2)


def _causal(shape: Heads) -> Heads:
    return replace(shape, alibi=False, documents=False)


ATTENTION = Operation(
    name="attention",
    ceiling="matmul",
    shapes=[*heads(tp_sizes=(1,)), *FLASH_HEADS],
    more_shapes=heads(tp_sizes=(2, 4)) + heads(SMALL_MODELS) + FP32_HEADS,
    example=_example,
    forward=_forward,
    backward=_backward,
    rivals=[
        Rival("ours", _ours, gpu=False),
        Rival("our kernel", _our_kernel, gpu=False),
        Rival("flex", _flex, compiles=True),
        Rival("flex, flash-attn 4", _flex_flash, compiles=True),
        Rival("sdpa, mask written out", _written_out, gpu=False),
        Rival("varlen_attn", _varlen),
        Rival("flash-attn", _flash),
        Rival("sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), other="causal alone", instead=_causal),
        Rival("sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), other="causal alone", instead=_causal),
    ],
    launches=_launches,
    precision=Precision(("out", "d query", "d key", "d value"), _ours, _plain),
)
