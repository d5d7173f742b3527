"""What is measured: an operation, random inputs for it, the work it must do at a shape, and who implements it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward+backward")
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class SkipRival(Exception):
    """Raised, with the reason, for a rival that is not measured."""


@dataclass(frozen=True)
class Work:
    """The least that an operation has to do, whoever implements it."""

    bytes: int
    """Every input of the direction read once and every result written once; nothing for intermediate tensors."""
    flops: int = 0
    """Floating-point operations of its matrix products; 0 if it has none."""
    executed_flops: int = 0
    """The same plus what must be computed twice if no matrix of scores or logits is kept."""

    def __add__(self, other: "Work") -> "Work":
        executed = self.executed_flops + other.executed_flops
        return Work(self.bytes + other.bytes, self.flops + other.flops, executed)


@dataclass(frozen=True)
class Example:
    inputs: tuple[Tensor, ...]
    """Those that get a gradient require it."""
    out_gradients: tuple[Tensor, ...]

    @property
    def inputs_with_grad(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.inputs if tensor.requires_grad)


@dataclass(frozen=True)
class RandomTensors:
    """Random values of one dtype on one device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype, generator=self.generator).mul_(scale)

    def leaf(self, *size: int, scale: float = 1.0) -> Tensor:
        """Normal values that get a gradient."""
        return self.normal(*size, scale=scale).requires_grad_()

    def integers(self, limit: int, *size: int) -> Tensor:
        return torch.randint(limit, size, device=self.device, generator=self.generator)


MakeExample = Callable[[Any, RandomTensors], Example]
"""From a shape and a source of random values."""


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


@dataclass(frozen=True)
class Operation:
    name: str
    ceiling: Literal["copy", "matmul"]
    """The limit of the device that the speed is reported as a fraction of."""
    make_example: MakeExample
    forward_work: Callable[[Any, int], Work]
    """From a shape and the bytes of an element."""
    backward_work: Callable[[Any, int], Work]
    rivals: list[Rival]
    shapes: list[Any]
    """Measured by default: the models on one rank."""
    extra_shapes: list[Any] = field(default_factory=list)
    """Measured only with `--shape`: more ranks, and the small configs."""

    def work(self, shape: Any, direction: Direction, element_bytes: int) -> Work:
        """The work of both directions is their sum, because autograd needs the result before it brings its gradient."""
        forward, backward = self.forward_work(shape, element_bytes), self.backward_work(shape, element_bytes)
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def upcast(x: Tensor) -> Tensor:
    """Convert to fp32; keep fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
