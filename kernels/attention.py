"""Causal attention with grouped keys, linear biases (ALiBi) and document masks.

    forward   p = softmax(scale * q k^T - slope * |i - j|) over the keys j <= i of i's document,  y = p v
    backward  dv = p^T dy,  ds = p * (dy v^T - rowsum(p * dy v^T)),  dq = scale * ds k,  dk = scale * ds^T q

Two ways to the same result. With a GPU, FlexAttention compiled for the case: it never holds the matrix of
scores and skips blocks that are masked altogether. Elsewhere PyTorch's SDPA with bias and mask written out.
Causal attention with neither biases nor documents takes SDPA's own causal path everywhere.

Fewer queries than keys are the last positions, whose keys and values a cache had no need to make again. They are few, so
their scores are written out on a GPU too: compiling anew for every number of keys would cost far more.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

RECOMPILE_LIMIT = 64
"""Shapes FlexAttention may be compiled for: one per phase, validation remainder and evaluation length."""

_BLOCK_MASKS = WeakTensorKeyDictionary()
"""Made by the first layer that sees a batch's documents, read by the others, gone with the batch."""


def attention(
    query: Float[Tensor, "rows queries heads head_dim"],
    key: Float[Tensor, "rows keys kv_heads head_dim"],
    value: Float[Tensor, "rows keys kv_heads head_dim"],
    *,
    scale: float,
    slopes: Float32[Tensor, " heads"] | Float32[Tensor, "rows heads"] | None,
    documents: Int[Tensor, "rows keys"] | None,
) -> Float[Tensor, "rows queries heads head_dim"]:
    """Every token's attention to itself and the earlier ones of its document; fp32 inside, query's dtype out.

    Queries are the last of the keys' positions. Query head h reads key head h // (heads // kv_heads). The bias joins
    the scaled scores, itself unscaled; each row may have its own slopes. Without `slopes` there is no bias, without
    `documents` a row is one document. `slopes` get no gradient.
    Nobody may write to `documents` afterwards: with a GPU its mask is kept for the layers that follow.

    Source: Press et al. 2022, "Train Short, Test Long", section 3; Ainslie et al. 2023, "GQA".
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    fewer = query.shape[1] < key.shape[1]
    if slopes is None and documents is None and not fewer:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    elif query.is_cuda and not fewer:
        mixed = _flex(q, k, v, scale, slopes, documents)
    else:
        mask = _written_out(slopes, documents, query, key)
        # SDPA's fused kernels for a GPU would want the bias in bf16 beside bf16 queries.
        with sdpa_kernel(SDPBackend.MATH) if query.is_cuda else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2)


def alibi_slopes(heads: int) -> Float32[Tensor, " heads"]:
    """The slope of every head: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    For other numbers, those of the power of two below, then every second one of the power of two above.
    Source: Press et al. 2022, section 3; for other numbers the authors' code, and Cerebras modelzoo
    `AlibiPositionEmbeddingLayer.py`.
    """
    power = 2 ** math.floor(math.log2(heads))

    def geometric(count: int) -> list[float]:
        return [2 ** (-8 * (index + 1) / count) for index in range(count)]

    return torch.tensor((geometric(power) + geometric(2 * power)[::2])[:heads], dtype=torch.float32)


def _written_out(slopes: Tensor | None, documents: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What SDPA takes as a mask: a bias in fp32 where there are slopes, else booleans.

    Never in bf16, whatever the query: its eight bits cannot tell neighbouring distances apart beyond 256.
    """
    source = torch.arange(key.shape[1], device=query.device)
    distance = source[-query.shape[1] :, None] - source
    seen = (distance >= 0)[None, None]
    if documents is not None:
        seen = seen & (documents[:, None, -query.shape[1] :, None] == documents[:, None, None, :])
    if slopes is None:
        return seen
    bias = -slopes.detach()[..., None, None] * distance.abs()
    # SDPA wants fp64 beside fp64.
    return bias.to(torch.promote_types(bias.dtype, query.dtype)).masked_fill(~seen, -math.inf)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None, documents: Tensor | None
) -> Tensor:
    arguments = {
        "score_mod": _score_mod(slopes),
        "block_mask": _block_mask(documents, query.shape[2], query.device),
        "scale": scale,
        "enable_gqa": True,
    }
    # At its limit dynamo raises because of fullgraph; else FlexAttention would quietly write out every score.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled_flex()(query, key, value, **arguments)


def _score_mod(slopes: Tensor | None) -> Callable[..., Tensor] | None:
    if slopes is None:
        return None
    fixed = slopes.detach()
    if fixed.dim() == 1:
        return lambda score, row, head, to, source: score - fixed[head] * (to - source).abs()
    return lambda score, row, head, to, source: score - fixed[row, head] * (to - source).abs()


def _mask_mod(documents: Tensor | None) -> Callable[..., Tensor]:
    if documents is None:
        return lambda row, head, to, source: to >= source
    return lambda row, head, to, source: (to >= source) & (documents[row, to] == documents[row, source])


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _block_mask(documents: Tensor | None, seq: int, device: torch.device) -> BlockMask:
    if documents is None:
        return _causal_block_mask(seq, device)
    if documents not in _BLOCK_MASKS:
        # A copy, because a mask that held its own key would keep both alive for ever.
        mask_mod = _mask_mod(documents.clone())
        _BLOCK_MASKS[documents] = create_block_mask(mask_mod, len(documents), None, seq, seq, device=device)
    return _BLOCK_MASKS[documents]


@functools.lru_cache(maxsize=8)
def _causal_block_mask(seq: int, device: torch.device) -> BlockMask:
    return create_block_mask(_mask_mod(None), None, None, seq, seq, device=device)
