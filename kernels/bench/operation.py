"""What is measured: an operation, inputs for it, the work it must do at a shape, and who implements it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from tandem.kernels.bench.shapes import MODELS, SMALL_MODELS, Shape, token_shapes

Function = Callable[..., Tensor | tuple[Tensor, ...]]


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
    ours: Callable[[Shape], Function]
    """Returns the function for a shape, which takes the example's inputs."""
    plain: Callable[[Shape], Function]
    """Returns the same in plain torch."""
    make_example: Callable[[Shape], Example]
    """Makes random values on torch's default device."""
    work: Callable[[Shape], tuple[Work, Work]]
    """Of forward and of backward."""

    def __init__(self) -> None:
        self.implementations = {"ours": self.ours, self.plain_name: self.plain}
        self.shapes = self.make_shapes(MODELS, (1,))
        """Measured by default."""
        self.extra_shapes = self.make_shapes(MODELS, (2, 4)) + self.make_shapes(SMALL_MODELS)
        """Measured only with `--shape`."""
