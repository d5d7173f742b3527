"""The residual stream with an update added, and its LayerNorm: whether one kernel for both would pay."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Rival,
    Work,
    compile_function,
    random_leaf,
    random_tensor,
)
from tandem.kernels.bench.shapes import SMALL_MODELS, ResidualShape, residual_shapes

NORM_EPS = 1e-5


def _make_example(
    shape: ResidualShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    sizes = [(shape.tokens, shape.hidden_size)] * 2 + [(shape.hidden_size,)] * 2
    inputs = tuple(random_leaf(size, device, dtype, generator) for size in sizes)
    return Example(inputs, tuple(random_tensor(sizes[0], device, dtype, generator) for _ in range(2)))


def _forward_work(shape: ResidualShape, element_bytes: int) -> Work:
    """Stream, update, weight and bias in, both results out."""
    return Work((4 * shape.tokens + 2) * shape.hidden_size * element_bytes)


def _backward_work(shape: ResidualShape, element_bytes: int) -> Work:
    """The sum, the weight and two gradients in; one gradient for stream and update, and those of weight and bias out."""
    return Work((4 * shape.tokens + 3) * shape.hidden_size * element_bytes)


def _torch(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + update
    return total, F.layer_norm(total, weight.shape, weight, bias, NORM_EPS)


def _liger(shape: ResidualShape) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def both(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + update
        return total, LigerLayerNormFunction.apply(total, weight, bias, NORM_EPS)

    return both


RESIDUAL_NORM = Operation(
    name="residual_norm",
    ceiling="copy",
    shapes=residual_shapes(),
    extra_shapes=residual_shapes(SMALL_MODELS),
    make_example=_make_example,
    forward_work=_forward_work,
    backward_work=_backward_work,
    rivals=[
        Rival("torch", lambda shape: _torch, needs_gpu=False),
        Rival("torch.compile", lambda shape: compile_function(_torch), is_slow_to_compile=True),
        Rival("torch, liger norm", _liger),
    ],
)
