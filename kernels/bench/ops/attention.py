"""Causal attention over [rows, seq, heads, head_dim], with linear biases or within documents if the shape has them."""

import functools
import random as python_random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels import documents
from tandem.kernels.attention import alibi_slopes, attention
from tandem.kernels.bench.operation import Example, Function, Operation, RandomTensors, Rival, Work
from tandem.kernels.bench.shapes import SMALL_MODELS, AttentionShape, attention_shapes

MEAN_DOCUMENT_TOKENS = 1_000


def document_lengths(shape: AttentionShape) -> list[list[int]]:
    """Exponential lengths of the documents of each row, cut at the row's end; the same at every call."""
    rng = python_random.Random(0)
    found = []
    for _ in range(shape.batch_size):
        row: list[int] = []
        while (remaining := shape.tokens - sum(row)) > 0:
            length = 1 + int(rng.expovariate(1 / MEAN_DOCUMENT_TOKENS)) if shape.document_masking else remaining
            row.append(min(remaining, length))
        found.append(row)
    return found


def document_ids(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """The index of each token's document, [rows, seq]."""
    if not shape.document_masking:
        return None
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in document_lengths(shape)]
    return torch.stack(rows).to(device, torch.int32)


def document_starts(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """The position in its row where each token's document begins, [rows, seq]."""
    ids = document_ids(shape, device)
    return None if ids is None else documents.document_starts(ids)


def slopes_of(shape: AttentionShape, device: torch.device) -> Tensor | None:
    return alibi_slopes(shape.num_heads).to(device) if shape.has_alibi else None


def cache_per_device(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
    """Make once what the layers of a model share."""
    return functools.lru_cache(maxsize=1)(make)


def _make_example(shape: AttentionShape, random: RandomTensors) -> Example:
    query, *others = [
        (shape.batch_size, shape.tokens, n, shape.head_dim) for n in (shape.num_heads, shape.num_kv_heads)
    ]
    inputs = tuple(random.leaf(*size) for size in (query, *others * 2))
    return Example(inputs, (random.normal(*query),))


def _forward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Reads queries, keys and values, writes the result and a number for each query: two products over the visible pairs."""
    flops = 4 * _num_visible_pairs(shape) * shape.num_heads * shape.head_dim
    return Work(_num_elements(shape, 2, 2) * element_bytes + _statistics_bytes(shape), flops, flops)


def _backward_work(shape: AttentionShape, element_bytes: int) -> Work:
    """Reads these five and a gradient, writes three gradients: four products, five if the scores are computed again."""
    flops = 8 * _num_visible_pairs(shape) * shape.num_heads * shape.head_dim
    return Work(_num_elements(shape, 4, 4) * element_bytes + _statistics_bytes(shape), flops, flops * 5 // 4)


def _num_visible_pairs(shape: AttentionShape) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(length * (length + 1) // 2 for row in document_lengths(shape) for length in row)


def _num_elements(shape: AttentionShape, queries: int, keys: int) -> int:
    return shape.batch_size * shape.tokens * shape.head_dim * (queries * shape.num_heads + keys * shape.num_kv_heads)


def _statistics_bytes(shape: AttentionShape) -> int:
    return 4 * shape.batch_size * shape.tokens * shape.num_heads


def our_attention(shape: AttentionShape) -> Function:
    slopes = cache_per_device(lambda device: slopes_of(shape, device))
    starts = cache_per_device(lambda device: document_starts(shape, device))
    return lambda q, k, v: attention(
        q, k, v, scale=shape.attention_scale, slopes=slopes(q.device), document_starts=starts(q.device)
    )


def _sdpa_with_mask(shape: AttentionShape) -> Function:
    @cache_per_device
    def mask(device: torch.device) -> Tensor:
        index = torch.arange(shape.tokens, device=device)
        distance = index[:, None] - index
        seen, ids, slopes = (distance >= 0)[None, None], document_ids(shape, device), slopes_of(shape, device)
        if ids is not None:
            seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
        if slopes is None:
            return seen
        # SDPA's kernels take a bias in the queries' dtype only. It is made head by head: in fp32 all heads would not fit.
        heads = [(-slope * distance).to(shape.dtype) for slope in slopes]
        return torch.stack(heads)[None].masked_fill_(~seen, -torch.inf)

    settings: dict[str, Any] = {"scale": shape.attention_scale, "enable_gqa": shape.num_heads > shape.num_kv_heads}
    sdpa = functools.partial(F.scaled_dot_product_attention, **settings)
    return lambda q, k, v: call_heads_first(sdpa, q, k, v, attn_mask=mask(q.device))


def call_heads_first(function: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **arguments).transpose(1, 2)


ATTENTION = Operation(
    "attention", "matmul", _make_example, _forward_work, _backward_work,
    rivals=[
        Rival("ours", our_attention, needs_gpu=False),
        Rival("sdpa, mask written out", _sdpa_with_mask, needs_gpu=False),
    ],
    shapes=attention_shapes(tp_sizes=(1,)),
    extra_shapes=attention_shapes(tp_sizes=(2, 4)) + attention_shapes(SMALL_MODELS),
)  # fmt: skip
