"""The residual stream plus an update, and its LayerNorm: would one kernel for both pay? We have none."""

import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Function, Operation, RandomTensors, Rival, Work
from tandem.kernels.bench.shapes import SMALL_MODELS
from tests.rivals.kernels.ops.compiled import compiled_rival
from tests.rivals.kernels.shapes import ResidualShape, residual_shapes

NORM_EPS = 1e-5


def _make_example(shape: ResidualShape, random: RandomTensors) -> Example:
    sizes = [(shape.tokens, shape.hidden_size)] * 2 + [(shape.hidden_size,)] * 2
    inputs = tuple(random.leaf(*size) for size in sizes)
    return Example(inputs, tuple(random.normal(*sizes[0]) for _ in range(2)))


def _forward_work(shape: ResidualShape, element_bytes: int) -> Work:
    """Reads stream, update, weight and bias, writes both results."""
    return Work((4 * shape.tokens + 2) * shape.hidden_size * element_bytes)


def _backward_work(shape: ResidualShape, element_bytes: int) -> Work:
    """Reads the sum, the weight and two gradients; writes one gradient for stream and update, and those of weight and bias."""
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
    "residual_norm", "copy", _make_example, _forward_work, _backward_work,
    rivals=[
        Rival("torch", lambda shape: _torch, needs_gpu=False),
        compiled_rival(lambda shape: _torch),
        Rival("torch, liger norm", _liger),
    ],
    shapes=residual_shapes(),
    extra_shapes=residual_shapes(SMALL_MODELS),
)  # fmt: skip
