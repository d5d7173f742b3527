"""What is measured. Each operation has random inputs, the least work it needs, our implementation, and plain torch's."""

import functools
import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels import documents
from tandem.kernels.attention import alibi_slopes, attention
from tandem.kernels.bench.shapes import MODELS, SMALL_MODELS, Shape, attention_shapes, rotary_shapes, token_shapes
from tandem.kernels.cross_entropy import cross_entropy
from tandem.kernels.device.shared import upcast
from tandem.kernels.linear_cross_entropy import linear_cross_entropy
from tandem.kernels.qkv import split_and_rotate_qkv
from tandem.kernels.rope import rotary_table
from tandem.kernels.swiglu import swiglu, swiglu_linear

MEAN_DOCUMENT_TOKENS = 1_000
NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
BYTES_PER_TARGET = 8 + 4
"""A target, and an fp32 number between forward and backward."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]
"""Takes the inputs of an example."""


class Work(NamedTuple):
    """The least that one direction of an operation has to do, whoever implements it."""

    bytes: int
    """Every input read once and every result written once; nothing for intermediate tensors."""
    flops: int = 0
    """Floating-point operations of its matrix products; 0 if it has none."""
    executed_flops: int = 0
    """The same plus what must be computed twice if no matrix of scores or logits is kept."""


class Example(NamedTuple):
    inputs: tuple[Tensor, ...]
    """Those that get a gradient require it."""
    out_gradients: tuple[Tensor, ...]

    @property
    def inputs_with_grad(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.inputs if tensor.requires_grad)


class Operation:
    name: str
    ceiling: Literal["copy", "matmul"]
    """The limit of the device that the speed is reported as a fraction of."""
    plain_name = "torch"
    make_shapes = staticmethod(token_shapes)
    make_example: Callable[[Shape], Example]
    """Makes random values on torch's default device."""
    work: Callable[[Shape], tuple[Work, Work]]
    """Of forward and of backward."""
    ours: Callable[[Shape], Function]
    plain: Callable[[Shape], Function]
    """The same in plain torch."""

    def __init__(self) -> None:
        self.implementations = {"ours": self.ours, self.plain_name: self.plain}
        self.shapes = self.make_shapes(MODELS, (1,))
        """Measured by default."""
        self.extra_shapes = self.make_shapes(MODELS, (2, 4)) + self.make_shapes(SMALL_MODELS)
        """Measured only with `--shape`."""


class Attention(Operation):
    """Causal attention over [rows, seq, heads, head_dim], with linear biases or within documents if the shape has them."""

    name, ceiling, plain_name = "attention", "matmul", "sdpa, mask written out"
    make_shapes = staticmethod(attention_shapes)

    def make_example(self, shape: Shape) -> Example:
        counts = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
        inputs = tuple(leaf(shape, shape.batch_size, shape.tokens, count, shape.head_dim) for count in counts)
        return Example(inputs, (torch.randn_like(inputs[0]).detach(),))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads queries, keys and values, and writes the result and a number for each query: two products over the
        visible pairs. Backward reads these five and a gradient, and writes three gradients: four products, five if the scores
        are computed again.
        """
        pairs = sum(length * (length + 1) // 2 for row in document_lengths(shape) for length in row)
        flops = 4 * pairs * shape.num_heads * shape.head_dim
        tokens, heads = shape.batch_size * shape.tokens, shape.num_heads + shape.num_kv_heads
        moved, statistics = 2 * tokens * heads * shape.head_dim * shape.dtype.itemsize, 4 * tokens * shape.num_heads
        return Work(moved + statistics, flops, flops), Work(2 * moved + statistics, 2 * flops, 5 * flops // 2)

    def ours(self, shape: Shape) -> Function:
        # Cached, because the layers of a model share them.
        slopes = functools.cache(lambda device: slopes_of(shape, device))
        starts = functools.cache(lambda device: document_starts(shape, device))
        return lambda q, k, v: attention(
            q, k, v, scale=shape.attention_scale, slopes=slopes(q.device), document_starts=starts(q.device)
        )

    def plain(self, shape: Shape) -> Function:
        @functools.cache
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

        grouped = shape.num_heads > shape.num_kv_heads
        sdpa = functools.partial(F.scaled_dot_product_attention, scale=shape.attention_scale, enable_gqa=grouped)
        return lambda q, k, v: call_heads_first(sdpa, q, k, v, attn_mask=mask(q.device))


class CrossEntropy(Operation):
    """Mean cross-entropy over a vocabulary, from logits.

    Only ours takes padded columns and a scale. Other implementations get the columns without padding, scaled in a separate
    step, as a caller of theirs would have to do it here.
    """

    name = "cross_entropy"
    ceiling: Literal["copy", "matmul"] = "copy"
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(
        # The view is there because the operation refuses a leaf.
        lambda logits, targets, **settings: cross_entropy(logits.view_as(logits), targets, **settings)
    )

    def make_example(self, shape: Shape) -> Example:
        inputs = leaf(shape, shape.tokens, shape.padded_vocab_size), torch.randint(shape.vocab_size, (shape.tokens,))
        return Example(inputs, (torch.ones(()),))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads the logits without padding. Backward reads them again, and writes the gradient of all."""
        forward = shape.tokens * (shape.vocab_size * shape.dtype.itemsize + BYTES_PER_TARGET)
        return Work(forward), Work(forward + shape.tokens * shape.padded_vocab_size * shape.dtype.itemsize)

    def our_losses(self, shape: Shape) -> Callable[..., Tensor]:
        """The loss of each token."""

        def losses(*inputs: Tensor) -> Tensor:
            columns, scale = shape.vocab_size, shape.logit_scale
            maximum, total, target_logit = self.statistics(*inputs, num_valid_columns=columns, scale=scale)
            return maximum - target_logit + total.log()

        return losses

    def ours(self, shape: Shape) -> Function:
        losses = self.our_losses(shape)
        return lambda *inputs: losses(*inputs).mean()

    def plain(self, shape: Shape) -> Function:
        return lambda logits, targets: F.cross_entropy(scaled_logits(shape, upcast(logits)), targets)


class LinearCrossEntropy(CrossEntropy):
    """Mean cross-entropy over a vocabulary, from the hidden state that gives the logits."""

    name, ceiling, statistics = "linear_cross_entropy", "matmul", staticmethod(linear_cross_entropy)

    def make_example(self, shape: Shape) -> Example:
        hidden = leaf(shape, shape.tokens, shape.hidden_size)
        weight = leaf(shape, shape.padded_vocab_size, shape.hidden_size, scale=shape.hidden_size**-0.5)
        return Example((hidden, weight, torch.randint(shape.vocab_size, (shape.tokens,))), (torch.ones(()),))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads hidden and weight: one product. Backward reads them again, and writes their gradients: two products,
        three if the logits are computed again.
        """
        rows, other = shape.tokens + shape.vocab_size, shape.tokens * BYTES_PER_TARGET
        row, both = shape.hidden_size * shape.dtype.itemsize, rows + shape.tokens + shape.padded_vocab_size
        flops, executed = (
            2 * shape.tokens * shape.hidden_size * x for x in (shape.vocab_size, shape.padded_vocab_size)
        )
        return Work(rows * row + other, flops, executed), Work(both * row + other, 2 * flops, 3 * executed)

    def plain(self, shape: Shape) -> Function:
        loss = super().plain(shape)
        return lambda hidden, weight, targets: loss(hidden @ weight.t(), targets)


class QKV(Operation):
    """A fused projection [seq, rows, ...] split into queries, keys and values [rows, seq, heads, head_dim].

    Queries and keys are normalized per head if the model does that, and rotated.
    """

    name, ceiling = "qkv", "copy"
    make_shapes = staticmethod(rotary_shapes)

    def make_example(self, shape: Shape) -> Example:
        """The buffer, cosines and sines, and the weights of both norms if there are norms."""
        index = torch.arange(shape.tokens)[None]
        starts = document_starts(shape, index.device)
        inputs = [leaf(shape, shape.tokens, shape.batch_size, num_slots(shape) * shape.head_dim)]
        inputs += rotary_table(index if starts is None else index - starts, shape.rotary_dims, ROTARY_BASE)
        counts = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
        if shape.qk_layernorm:
            inputs += [leaf(shape, count, shape.head_dim) for count in counts[:2]]
        sizes = [(shape.batch_size, shape.tokens, count, shape.head_dim) for count in counts]
        return Example(tuple(inputs), tuple(torch.randn(size, dtype=shape.dtype) for size in sizes))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads the buffer, the tables and the weights, and writes the three parts of the buffer. Backward reads three
        gradients and writes one; with norms it also reads queries and keys, and writes the weights' gradients.
        """
        rows, slots = shape.batch_size * shape.tokens, num_slots(shape)
        norms = shape.num_heads + shape.num_kv_heads if shape.qk_layernorm else 0
        # Two fp32 numbers for each pair of dims. Every row has its own table if rows hold documents.
        table_bytes = 4 * shape.rotary_dims * (rows if shape.document_masking else shape.tokens)
        forward, backward = 2 * rows * slots + norms, rows * (2 * slots + norms) + 2 * norms
        head_bytes = shape.head_dim * shape.dtype.itemsize
        return Work(forward * head_bytes + table_bytes), Work(backward * head_bytes + table_bytes)

    def ours(self, shape: Shape) -> Function:
        return lambda qkv, cos, sin, query_norm=None, key_norm=None: split_and_rotate_qkv(
            qkv, cos, sin, head_dim=shape.head_dim, num_queries_per_kv=shape.num_queries_per_kv,
            query_norm=query_norm, key_norm=key_norm, norm_eps=NORM_EPS,
        )  # fmt: skip

    def plain(self, shape: Shape) -> Function:
        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            half = cos.shape[-1]
            first, second, rest = x.tensor_split((half, 2 * half), dim=-1)
            cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
            turned = (first * cos - second * sin, second * cos + first * sin)
            return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)

        def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            query, key, value = split_heads(shape, qkv, weights)
            return rotate(query, cos, sin), rotate(key, cos, sin), value

        return rotated


class SwiGLU(Operation):
    """SwiGLU on one buffer [tokens, 2, ffn_hidden_size]."""

    name, ceiling = "swiglu", "copy"

    def make_example(self, shape: Shape) -> Example:
        gate_up = leaf(shape, shape.tokens, 2, shape.ffn_hidden_size)
        return Example((gate_up,), (torch.randn(shape.tokens, shape.ffn_hidden_size, dtype=shape.dtype),))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads both halves and writes one result. Backward reads both and a gradient, and writes two gradients."""
        half = shape.tokens * shape.ffn_hidden_size * shape.dtype.itemsize
        return Work(3 * half), Work(5 * half)

    def ours(self, shape: Shape) -> Function:
        return swiglu

    def plain(self, shape: Shape) -> Function:
        return lambda gate_up: F.silu(gate_up[:, 0]) * gate_up[:, 1]


class SwiGLULinear(Operation):
    """SwiGLU with the matrix product that follows."""

    name, ceiling = "swiglu_linear", "matmul"

    def make_example(self, shape: Shape) -> Example:
        gate_up = leaf(shape, shape.tokens, 2, shape.ffn_hidden_size)
        weight = leaf(shape, shape.hidden_size, shape.ffn_hidden_size, scale=shape.ffn_hidden_size**-0.5)
        return Example((gate_up, weight), (torch.randn(shape.tokens, shape.hidden_size, dtype=shape.dtype),))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads both halves and the weight, and writes the product. Backward reads these and a gradient, and writes the
        gradients of halves and weight: two products.
        """
        tokens, ffn, width, size = shape.tokens, shape.ffn_hidden_size, shape.hidden_size, shape.dtype.itemsize
        inputs, out, flops = 2 * tokens * ffn + ffn * width, tokens * width, 2 * tokens * ffn * width
        return Work((inputs + out) * size, flops, flops), Work((2 * inputs + out) * size, 2 * flops, 2 * flops)

    def ours(self, shape: Shape) -> Function:
        return swiglu_linear

    def plain(self, shape: Shape) -> Function:
        return lambda gate_up, weight: F.linear(F.silu(gate_up[:, 0]) * gate_up[:, 1], weight)


def leaf(shape: Shape, *size: int, scale: float = 1.0) -> Tensor:
    """Return normal values that get a gradient."""
    return torch.randn(size, dtype=shape.dtype).mul_(scale).requires_grad_()


def document_lengths(shape: Shape) -> list[list[int]]:
    """Exponential lengths of the documents of each row, cut at the row's end; the same at every call."""
    rng = random.Random(0)
    found = []
    for _ in range(shape.batch_size):
        row: list[int] = []
        while (remaining := shape.tokens - sum(row)) > 0:
            length = 1 + int(rng.expovariate(1 / MEAN_DOCUMENT_TOKENS)) if shape.document_masking else remaining
            row.append(min(remaining, length))
        found.append(row)
    return found


def document_ids(shape: Shape, device: torch.device) -> Tensor | None:
    """The index of each token's document, [rows, seq]."""
    if not shape.document_masking:
        return None
    rows = [[index for index, length in enumerate(row) for _ in range(length)] for row in document_lengths(shape)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def document_starts(shape: Shape, device: torch.device) -> Tensor | None:
    """The position in its row where each token's document begins, [rows, seq]."""
    ids = document_ids(shape, device)
    return None if ids is None else documents.document_starts(ids)


def slopes_of(shape: Shape, device: torch.device) -> Tensor | None:
    return alibi_slopes(shape.num_heads).to(device) if shape.has_alibi else None


def call_heads_first(function: Any, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **arguments).transpose(1, 2)


def scaled_logits(shape: Shape, logits: Tensor) -> Tensor:
    columns = logits if shape.vocab_size == shape.padded_vocab_size else logits[:, : shape.vocab_size]
    return columns if shape.logit_scale == 1.0 else columns * shape.logit_scale


def num_slots(shape: Shape) -> int:
    """Heads of the fused buffer."""
    return shape.num_heads + 2 * shape.num_kv_heads


def split_heads(shape: Shape, qkv: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the first two are normalized if there are weights, and not yet rotated."""
    queries = shape.num_queries_per_kv
    grouped = qkv.transpose(0, 1).unflatten(-1, (-1, queries + 2, shape.head_dim))
    query, key, value = grouped[..., :queries, :].flatten(2, 3), grouped[..., queries, :], grouped[..., queries + 1, :]
    if weights:
        normalized = (F.layer_norm(upcast(x), x.shape[-1:], eps=NORM_EPS) for x in (query, key))
        query, key = ((x * weight).to(qkv.dtype) for x, weight in zip(normalized, weights, strict=True))
    return query, key, value.contiguous()


OPERATIONS: dict[str, Operation] = {
    op.name: op for op in (Attention(), LinearCrossEntropy(), SwiGLU(), SwiGLULinear(), QKV(), CrossEntropy())
}
"""In the order of measurement: those that take most of a step's time come first, in case time runs out."""
