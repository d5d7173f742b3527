"""SwiGLU alone, and SwiGLU with the matrix product that follows, on one buffer [tokens, 2, ffn_hidden_size]."""

import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Operation, RandomTensors, Rival, Work
from tandem.kernels.bench.shapes import SMALL_MODELS, FeedForwardShape, feed_forward_shapes
from tandem.kernels.swiglu import swiglu, swiglu_linear


def _make_example(shape: FeedForwardShape, random: RandomTensors) -> Example:
    gate_up = random.leaf(shape.tokens, 2, shape.ffn_hidden_size)
    return Example((gate_up,), (random.normal(shape.tokens, shape.ffn_hidden_size),))


def _forward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Reads both halves, writes one result."""
    return Work(3 * shape.tokens * shape.ffn_hidden_size * element_bytes)


def _backward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Reads both halves and a gradient, writes two gradients."""
    return Work(5 * shape.tokens * shape.ffn_hidden_size * element_bytes)


def _make_linear_example(shape: FeedForwardShape, random: RandomTensors) -> Example:
    gate_up = random.leaf(shape.tokens, 2, shape.ffn_hidden_size)
    weight = random.leaf(shape.hidden_size, shape.ffn_hidden_size, scale=shape.ffn_hidden_size**-0.5)
    return Example((gate_up, weight), (random.normal(shape.tokens, shape.hidden_size),))


def _linear_forward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Reads both halves and the weight, writes the product."""
    tokens, ffn, width = shape.tokens, shape.ffn_hidden_size, shape.hidden_size
    flops = 2 * tokens * ffn * width
    return Work((2 * tokens * ffn + ffn * width + tokens * width) * element_bytes, flops, flops)


def _linear_backward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Reads both halves, the weight and a gradient, writes the gradients of halves and weight: two products."""
    tokens, ffn, width = shape.tokens, shape.ffn_hidden_size, shape.hidden_size
    flops = 4 * tokens * ffn * width
    return Work((4 * tokens * ffn + 2 * ffn * width + tokens * width) * element_bytes, flops, flops)


def torch_swiglu(gate_up: Tensor) -> Tensor:
    return F.silu(gate_up[:, 0]) * gate_up[:, 1]


def torch_swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    return F.linear(torch_swiglu(gate_up), weight)


SWIGLU = Operation(
    "swiglu", "copy", _make_example, _forward_work, _backward_work,
    rivals=[
        Rival("ours", lambda shape: swiglu, needs_gpu=False),
        Rival("torch", lambda shape: torch_swiglu, needs_gpu=False),
    ],
    shapes=feed_forward_shapes(tp_sizes=(1,)),
    extra_shapes=feed_forward_shapes(tp_sizes=(2, 4)) + feed_forward_shapes(SMALL_MODELS),
)  # fmt: skip
SWIGLU_LINEAR = Operation(
    "swiglu_linear", "matmul", _make_linear_example, _linear_forward_work, _linear_backward_work,
    rivals=[
        Rival("ours", lambda shape: swiglu_linear, needs_gpu=False),
        Rival("torch", lambda shape: torch_swiglu_linear, needs_gpu=False),
    ],
    shapes=SWIGLU.shapes,
    extra_shapes=SWIGLU.extra_shapes,
)  # fmt: skip
