"""The residual stream with an update added, and its LayerNorm: whether one kernel for both would pay."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Function, Operation, Rival, Work, compiled, leaf, values
from tandem.kernels.bench.shapes import SMALL_MODELS, Stream, stream

EPSILON = 1e-5


def _example(shape: Stream, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    sizes = [(shape.tokens, shape.width)] * 2 + [(shape.width,)] * 2
    inputs = tuple(leaf(size, device, dtype, generator) for size in sizes)
    return Example(inputs, tuple(values(sizes[0], device, dtype, generator) for _ in range(2)))


def _forward(shape: Stream, element_bytes: int) -> Work:
    """Stream, update, weight and bias in, both results out."""
    return Work((4 * shape.tokens + 2) * shape.width * element_bytes)


def _backward(shape: Stream, element_bytes: int) -> Work:
    """The sum, the weight and two gradients in; one gradient for stream and update, and those of weight and bias out."""
    return Work((4 * shape.tokens + 3) * shape.width * element_bytes)


def _torch(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + update
    return total, F.layer_norm(total, weight.shape, weight, bias, EPSILON)


def _liger(shape: Stream) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def both(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + update
        return total, LigerLayerNormFunction.apply(total, weight, bias, EPSILON)

    return both


RESIDUAL_NORM = Operation(
    name="residual_norm",
    ceiling="copy",
    shapes=stream(),
    more_shapes=stream(SMALL_MODELS),
    example=_example,
    forward=_forward,
    backward=_backward,
    rivals=[
        Rival("torch", lambda shape: _torch, gpu=False),
        Rival("torch.compile", lambda shape: compiled(_torch), compiles=True),
        Rival("torch, liger norm", _liger),
    ],
)
