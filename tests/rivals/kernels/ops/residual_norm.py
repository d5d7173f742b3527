"""The residual stream plus an update, and its LayerNorm: would one kernel for both pay? We have none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.ops import Example, Function, Operation, Work, leaf
from tandem.kernels.bench.shapes import MODELS, SMALL_MODELS, Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival
from tests.rivals.kernels.ops.compiled import compiled_rival
from tests.rivals.kernels.shapes import residual_shapes

NORM_EPS = 1e-5


class _ResidualNorm(Operation):
    name, ceiling = "residual_norm", "copy"

    def __init__(self) -> None:
        self.shapes, self.extra_shapes = residual_shapes(MODELS), residual_shapes(SMALL_MODELS)

    def make_example(self, shape: Shape) -> Example:
        sizes = [(shape.tokens, shape.hidden_size)] * 2 + [(shape.hidden_size,)] * 2
        inputs = tuple(leaf(shape, *size) for size in sizes)
        return Example(inputs, tuple(torch.randn(sizes[0], dtype=shape.dtype) for _ in range(2)))

    def work(self, shape: Shape) -> tuple[Work, Work]:
        """Forward reads stream, update, weight and bias, and writes both results. Backward reads the sum, the weight and two
        gradients, and writes one gradient for stream and update, and those of weight and bias.
        """
        row = shape.hidden_size * shape.dtype.itemsize
        return Work((4 * shape.tokens + 2) * row), Work((4 * shape.tokens + 3) * row)


def _torch(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + update
    return total, F.layer_norm(total, weight.shape, weight, bias, NORM_EPS)


def _liger(shape: Shape) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def both(stream: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + update
        return total, LigerLayerNormFunction.apply(total, weight, bias, NORM_EPS)

    return both


RESIDUAL_NORM = ContestedOperation(
    _ResidualNorm(),
    rivals=[
        Rival("torch", lambda shape: _torch, needs_gpu=False),
        compiled_rival(lambda shape: _torch),
        Rival("torch, liger norm", _liger),
    ],
)
