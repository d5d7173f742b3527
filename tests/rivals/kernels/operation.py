"""An operation of `tandem.kernels.bench` with more implementations of it: the rivals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.kernels.bench.ops import Example, Function, Operation
from tandem.kernels.bench.shapes import Shape

MakeExample = Callable[[Shape], Example]


@dataclass(frozen=True)
class Rival:
    """One implementation of an operation: ours, plain torch or another project's."""

    name: str
    make_function: Callable[[Any], Function]
    """Returns the function for a shape, which takes the example's inputs. Optional packages are imported here."""
    needs_gpu: bool = True
    """Runs on a GPU, or in Triton's interpreter if its kernels are written in Triton."""
    is_slow_to_compile: bool = False
    """Takes seconds to compile for each shape."""
    deviation: str = ""
    """What it computes instead, if it does not compute the operation at the shape. Its results need not agree then."""
    make_example: MakeExample | None = None
    """Its own inputs, if they differ from the operation's."""
    substitute_shape: Callable[[Any], Any] = lambda shape: shape
    """Its own shape, for inputs and work alike, if it differs from the operation's."""


class ContestedOperation(Operation):
    """An operation, rivals in addition to its own two implementations, and the shapes that rivals publish."""

    def __init__(
        self,
        base: Operation,
        rivals: Sequence[Rival],
        shapes: Sequence[Shape] = (),
        extra_shapes: Sequence[Shape] = (),
    ) -> None:
        self.name, self.ceiling, self.make_example, self.work = base.name, base.ceiling, base.make_example, base.work
        self.rivals = rivals
        self.implementations = {rival.name: rival.make_function for rival in rivals}
        self.shapes, self.extra_shapes = [*base.shapes, *shapes], [*base.extra_shapes, *extra_shapes]


def own_rivals(base: Operation) -> list[Rival]:
    """Return ours and plain torch."""
    return [Rival(name, make_function, needs_gpu=False) for name, make_function in base.implementations.items()]
