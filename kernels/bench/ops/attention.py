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

from tandem.kernels.bench.documents import document_ids, document_lengths, document_starts
from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Rival,
    SkipRival,
    Work,
    random_leaf,
    random_tensor,
    upcast,
)
from tandem.kernels.bench.shapes import (
    FLASH_ATTENTION_SHAPES,
    FP32_ATTENTION_SHAPES,
    SMALL_MODELS,
    AttentionShape,
    attention_shapes,
)


def _make_example(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    sizes = [
        (shape.batch_size, shape.tokens, count, shape.head_dim)
        for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]
    inputs = tuple(random_leaf(size, device, dtype, generator) for size in sizes)
    return Example(inputs, (random_tensor(sizes[0], device, dtype, generator),))


def _forward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Queries, keys and values in, the result and a number for each query out: two products over the pairs that are seen."""
    flops = 4 * _num_visible_pairs(shape) * shape.num_heads * shape.head_dim
    return Work(_num_elements(shape, 2, 2) * element_bytes + _statistics_bytes(shape), flops, flops)


def _backward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """These five and a gradient in, three gradients out: four products, five with the scores once more."""
    flops = 8 * _num_visible_pairs(shape) * shape.num_heads * shape.head_dim
    return Work(_num_elements(shape, 4, 4) * element_bytes + _statistics_bytes(shape), flops, flops * 5 // 4)


def _num_visible_pairs(shape: AttentionShape) -> int:
    """Queries and keys that see each other."""
    return sum(length * (length + 1) // 2 for row in document_lengths(shape) for length in row)


def _num_elements(shape: AttentionShape, queries: int, keys: int) -> int:
    return shape.batch_size * shape.tokens * shape.head_dim * (queries * shape.num_heads + keys * shape.num_kv_heads)


def _statistics_bytes(shape: AttentionShape) -> int:
    return 4 * shape.batch_size * shape.tokens * shape.num_heads


def _slopes(shape: AttentionShape, device: torch.device) -> Tensor | None:
    from tandem.kernels.attention import alibi_slopes

    return alibi_slopes(shape.num_heads).to(device) if shape.has_alibi else None


def _cache_per_device(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
    """What the layers of a model share is made by the first of them."""
    return functools.lru_cache(maxsize=1)(make)


def _ours(shape: AttentionShape) -> Function:
    from tandem.kernels.attention import attention

    slopes = _cache_per_device(lambda device: _slopes(shape, device))
    document_starts_on = _cache_per_device(lambda device: document_starts(shape, device))
    return lambda q, k, v: attention(
        q, k, v, scale=shape.attention_scale, slopes=slopes(q.device), document_starts=document_starts_on(q.device)
    )


def _our_kernel(shape: AttentionShape) -> Function:
    """Where attention is SDPA's, as there is nothing that SDPA would not do."""
    import tandem.kernels.attention

    assert tandem.kernels.attention
    if shape.has_alibi or shape.document_masking:
        raise SkipRival("biases or documents: ours is this kernel already")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise SkipRival("needs a GPU")  # elsewhere the operation is no kernel
        return torch.ops.tandem.attention(q, k, v, shape.attention_scale, None, None)[0]

    return kernel


def _flex_flash(shape: AttentionShape) -> Function:
    """Of FlashAttention 4, whose package without CuTe torch would refuse in the middle of compiling."""
    import flash_attn.cute

    assert flash_attn.cute
    return _flex(shape, "FLASH")


def _flex(shape: AttentionShape, backend: str = "TRITON") -> Function:
    flex: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @_cache_per_device
    def arguments(device: torch.device) -> dict[str, Any]:
        slopes, apart = _slopes(shape, device), document_ids(shape, device)

        def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query - key).abs()  # type: ignore[index]

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key if apart is None else (query >= key) & (apart[row, query] == apart[row, key])

        rows = None if apart is None else shape.batch_size
        mask = create_block_mask(seen, rows, None, shape.tokens, shape.tokens, device=device)
        return {
            "score_mod": biased if shape.has_alibi else None,
            "block_mask": mask,
            "scale": shape.attention_scale,
            "enable_gqa": True,
            "kernel_options": {"BACKEND": backend},
        }

    return lambda q, k, v: _call_heads_first(flex, q, k, v, **arguments(q.device))


def _sdpa_with_mask(shape: AttentionShape) -> Function:
    @_cache_per_device
    def mask(device: torch.device) -> Tensor:
        index = torch.arange(shape.tokens, device=device)
        distance = index[:, None] - index
        seen, apart, slopes = (distance >= 0)[None, None], document_ids(shape, device), _slopes(shape, device)
        if apart is not None:
            seen = seen & (apart[:, None, :, None] == apart[:, None, None, :])
        if slopes is None:
            return seen
        # SDPA's kernels take a bias in the queries' dtype alone; made by heads, as all of them in fp32 would not fit.
        heads = [(-slope * distance).to(shape.dtype) for slope in slopes]
        return torch.stack(heads)[None].masked_fill_(~seen, -torch.inf)

    scaled = functools.partial(
        F.scaled_dot_product_attention, scale=shape.attention_scale, enable_gqa=shape.num_heads > shape.num_kv_heads
    )
    return lambda q, k, v: _call_heads_first(scaled, q, k, v, attn_mask=mask(q.device))


def _eager(shape: AttentionShape) -> Function:
    """Scores written out: products in the inputs' dtype, biases and softmax in fp32. For one head of keys at a time.

    SDPA takes biases in the inputs' dtype, and bf16 rounds those of far keys by more than it rounds their weights.
    """

    @_cache_per_device
    def mask_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        place = torch.arange(shape.tokens, device=device)
        distance, apart = place[:, None] - place, document_ids(shape, device)
        unseen = (distance < 0)[None, None]
        if apart is not None:
            unseen = unseen | (apart[:, None, :, None] != apart[:, None, None, :])
        return distance, unseen, _slopes(shape, device)

    def attend_kv_head(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, distance: Tensor, unseen: Tensor
    ) -> Tensor:
        scores = shape.attention_scale * upcast(q @ k.mT)
        if slopes is not None:
            scores = scores - slopes.to(scores.dtype)[:, None, None] * distance
        return scores.masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype) @ v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance, unseen, slopes = mask_inputs(q.device)
        group = shape.num_heads // shape.num_kv_heads
        parts = (x.transpose(1, 2).split(size, 1) for x, size in ((q, group), (k, 1), (v, 1)))
        of_heads = [None] * shape.num_kv_heads if slopes is None else slopes.split(group)
        heads = [
            checkpoint(attend_kv_head, *part, distance, unseen, use_reentrant=False)
            for part in zip(*parts, of_heads, strict=True)
        ]
        return torch.cat(heads, 1).transpose(1, 2)

    return attend


def _sdpa(backend: SDPBackend) -> Callable[[AttentionShape], Function]:
    def function(shape: AttentionShape) -> Function:
        gqa = shape.num_heads > shape.num_kv_heads
        scaled = functools.partial(
            F.scaled_dot_product_attention, is_causal=True, scale=shape.attention_scale, enable_gqa=gqa
        )

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _call_heads_first(scaled, q, k, v)

        return causal

    return function


def _flash(shape: AttentionShape) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if not shape.document_masking:
        slopes = _cache_per_device(lambda device: _slopes(shape, device))
        common = {"softmax_scale": shape.attention_scale, "causal": True}
        return lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=slopes(q.device), **common)
    max_seqlen, cu_seqlens = _max_and_cu_seqlens(shape)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed, bounds = (x.flatten(0, 1) for x in (q, k, v)), cu_seqlens(q.device)
        options = {"softmax_scale": shape.attention_scale, "causal": True}
        return flash_attn_varlen_func(*packed, bounds, bounds, max_seqlen, max_seqlen, **options).view_as(q)

    return varlen


def _varlen(shape: AttentionShape) -> Function:
    """Torch's own, of the FlashAttention that SDPA has."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    if shape.has_alibi:
        raise SkipRival("varlen_attn has no biases")
    if not shape.document_masking:
        raise SkipRival("without documents varlen_attn is the kernel of sdpa flash")
    max_seqlen, cu_seqlens = _max_and_cu_seqlens(shape)
    options: dict[str, Any] = {"scale": shape.attention_scale, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(attend).parameters:  # torch 2.11 takes groups unasked
        options["enable_gqa"] = shape.num_heads > shape.num_kv_heads

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, bounds = (x.flatten(0, 1) for x in (q, k, v)), cu_seqlens(q.device)
        return attend(*rows, bounds, bounds, max_seqlen, max_seqlen, **options).view_as(q)

    return packed


def _max_and_cu_seqlens(shape: AttentionShape) -> tuple[int, Callable[[torch.device], Tensor]]:
    """Tokens of the longest document; where documents end once rows lie behind one another, from 0 on."""
    flat = [length for row in document_lengths(shape) for length in row]
    return max(flat), _cache_per_device(lambda device: torch.tensor([0, *flat], device=device).cumsum(0).int())


def _launch_kernels(shape: AttentionShape) -> None:
    from tandem.kernels.device import attention as device

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    query, key, value = (
        empty(shape.batch_size, shape.tokens, n, shape.head_dim) for n in (shape.num_heads, *[shape.num_kv_heads] * 2)
    )
    slopes = empty(shape.num_heads, dtype=torch.float32) if shape.has_alibi else None
    begin = empty(shape.batch_size, shape.tokens, dtype=torch.int32) if shape.document_masking else None
    out, statistics = device.forward(query, key, value, shape.attention_scale, slopes, begin)
    device.backward(out, query, key, value, out, statistics, shape.attention_scale, slopes, begin)


def _call_heads_first(function: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **arguments).transpose(1, 2)


def _causal_shape(shape: AttentionShape) -> AttentionShape:
    return replace(shape, has_alibi=False, document_masking=False)


ATTENTION = Operation(
    name="attention",
    ceiling="matmul",
    shapes=[*attention_shapes(tp_sizes=(1,)), *FLASH_ATTENTION_SHAPES],
    extra_shapes=attention_shapes(tp_sizes=(2, 4)) + attention_shapes(SMALL_MODELS) + FP32_ATTENTION_SHAPES,
    make_example=_make_example,
    forward_work=_forward_work,
    backward_work=_backward_work,
    rivals=[
        Rival("ours", _ours, needs_gpu=False),
        Rival("our kernel", _our_kernel, needs_gpu=False),
        Rival("flex", _flex, is_slow_to_compile=True),
        Rival("flex, flash-attn 4", _flex_flash, is_slow_to_compile=True),
        Rival("sdpa, mask written out", _sdpa_with_mask, needs_gpu=False),
        Rival("varlen_attn", _varlen),
        Rival("flash-attn", _flash),
        Rival(
            "sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), deviation="causal alone", substitute_shape=_causal_shape
        ),
        Rival(
            "sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), deviation="causal alone", substitute_shape=_causal_shape
        ),
    ],
    launch_kernels=_launch_kernels,
    precision=Precision(("out", "d query", "d key", "d value"), _ours, _eager),
)
