"""An operation for tests of the harness: the square of each element."""

import torch

from tandem.kernels.bench.measure import Ceilings
from tandem.kernels.bench.ops import Example, Operation, Work
from tandem.kernels.bench.shapes import Shape

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e12)


class Square(Operation):
    name, ceiling = "square", "copy"

    def __init__(self, implementations) -> None:
        self.implementations, self.shapes = implementations, [Shape("tiny", tokens=64)]

    def make_example(self, shape) -> Example:
        x = torch.randn(shape.tokens, dtype=shape.dtype, requires_grad=True)
        return Example((x,), (torch.ones(shape.tokens, dtype=shape.dtype),))

    def work(self, shape) -> tuple[Work, Work]:
        return Work(4 * shape.tokens), Work(4 * shape.tokens)


class _OverwritingSquare(torch.autograd.Function):
    """Backward writes the gradient over the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        ctx.x.data.mul_(2).mul_(gradient)
        return ctx.x.data


overwriting_square = _OverwritingSquare.apply
