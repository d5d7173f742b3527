"""Rivals of attention.

Rivals without biases or documents run the shape without them, which shows the speed that such a shape can reach at all. Their
rates count the work that they do then.
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

import tandem.kernels.attention
from tandem.kernels.bench.compare import NotMeasured
from tandem.kernels.bench.ops import OPERATIONS, Function, call_heads_first, document_ids, document_lengths, slopes_of
from tandem.kernels.bench.shapes import Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival, own_rivals
from tests.rivals.kernels.shapes import FLASH_ATTENTION_SHAPES, FP32_ATTENTION_SHAPES

assert tandem.kernels.attention  # registers torch.ops.tandem.attention


def _our_kernel(shape: Shape) -> Function:
    """Our kernel where `attention` calls SDPA, which has neither biases nor documents to honour there."""
    if shape.has_alibi or shape.document_masking:
        raise NotMeasured("biases or documents: ours is this kernel already")

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise NotMeasured("needs a GPU")  # on a CPU the operation is no kernel
        return torch.ops.tandem.attention(q, k, v, shape.attention_scale, None, None)[0]

    return kernel


def _flex_flash(shape: Shape) -> Function:
    """FlashAttention 4. Without its CuTe package torch would fail in the middle of compiling."""
    import flash_attn.cute

    assert flash_attn.cute
    return _flex(shape, "FLASH")


def _flex(shape: Shape, backend: str = "TRITON") -> Function:
    flex: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @functools.cache
    def arguments(device: torch.device) -> dict[str, Any]:
        slopes, ids = slopes_of(shape, device), document_ids(shape, device)

        def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query - key).abs()  # type: ignore[index]

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key if ids is None else (query >= key) & (ids[row, query] == ids[row, key])

        rows = None if ids is None else shape.batch_size
        mask = create_block_mask(seen, rows, None, shape.tokens, shape.tokens, device=device)
        return {
            "score_mod": biased if shape.has_alibi else None,
            "block_mask": mask,
            "scale": shape.attention_scale,
            "enable_gqa": True,
            "kernel_options": {"BACKEND": backend},
        }

    return lambda q, k, v: call_heads_first(flex, q, k, v, **arguments(q.device))


def _sdpa(backend: SDPBackend) -> Callable[[Shape], Function]:
    def function(shape: Shape) -> Function:
        settings: dict[str, Any] = {"scale": shape.attention_scale, "enable_gqa": shape.num_heads > shape.num_kv_heads}
        sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, **settings)

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return call_heads_first(sdpa, q, k, v)

        return causal

    return function


def _flash(shape: Shape) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {"softmax_scale": shape.attention_scale, "causal": True}
    if not shape.document_masking:
        slopes = functools.cache(lambda device: slopes_of(shape, device))
        return lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=slopes(q.device), **options)
    max_seqlen, cu_seqlens = max_and_cu_seqlens(shape)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed, bounds = (x.flatten(0, 1) for x in (q, k, v)), cu_seqlens(q.device)
        return flash_attn_varlen_func(*packed, bounds, bounds, max_seqlen, max_seqlen, **options).view_as(q)

    return varlen


def _varlen(shape: Shape) -> Function:
    """Torch's own entry to the FlashAttention that SDPA uses."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    if shape.has_alibi:
        raise NotMeasured("varlen_attn has no biases")
    if not shape.document_masking:
        raise NotMeasured("without documents varlen_attn is the kernel of sdpa flash")
    max_seqlen, cu_seqlens = max_and_cu_seqlens(shape)
    options: dict[str, Any] = {"scale": shape.attention_scale, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(attend).parameters:  # torch 2.11 takes groups without it
        options["enable_gqa"] = shape.num_heads > shape.num_kv_heads

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, bounds = (x.flatten(0, 1) for x in (q, k, v)), cu_seqlens(q.device)
        return attend(*rows, bounds, bounds, max_seqlen, max_seqlen, **options).view_as(q)

    return packed


def max_and_cu_seqlens(shape: Shape) -> tuple[int, Callable[[torch.device], Tensor]]:
    """Tokens of the longest document, and where documents end once all rows are concatenated, from 0 on."""
    flat = [length for row in document_lengths(shape) for length in row]
    return max(flat), functools.cache(lambda device: torch.tensor([0, *flat], device=device).cumsum(0).int())


def _causal_shape(shape: Shape) -> Shape:
    return replace(shape, has_alibi=False, document_masking=False)


def _causal_rival(name: str, backend: SDPBackend) -> Rival:
    return Rival(name, _sdpa(backend), deviation="causal alone", substitute_shape=_causal_shape)


_OURS, _SDPA_WITH_MASK = own_rivals(OPERATIONS["attention"])
ATTENTION = ContestedOperation(
    OPERATIONS["attention"],
    shapes=FLASH_ATTENTION_SHAPES,
    extra_shapes=FP32_ATTENTION_SHAPES,
    rivals=[
        _OURS,
        Rival("our kernel", _our_kernel, needs_gpu=False),
        Rival("flex", _flex, is_slow_to_compile=True),
        Rival("flex, flash-attn 4", _flex_flash, is_slow_to_compile=True),
        _SDPA_WITH_MASK,
        Rival("varlen_attn", _varlen),
        Rival("flash-attn", _flash),
        _causal_rival("sdpa flash", SDPBackend.FLASH_ATTENTION),
        _causal_rival("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
    ],
)
