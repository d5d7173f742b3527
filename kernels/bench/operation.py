"""What can be measured: an operation, what it must do at a shape, and who offers it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward+backward")
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class SkipRival(Exception):
    """A rival that is not measured, with the reason."""


@dataclass(frozen=True)
class Work:
    """The least an operation does, whoever does it."""

    bytes: int
    """Every input of the direction read once, every result written once; nothing in between."""
    flops: int = 0
    """Of its matrix products; 0 if it has none."""
    executed_flops: int = 0
    """With what is computed a second time by whoever keeps no matrix of scores or logits."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes, self.flops + other.flops, self.executed_flops + other.executed_flops
        )  # fmt: skip


@dataclass(frozen=True)
class Example:
    """Random values to compute with."""

    inputs: tuple[Tensor, ...]
    """Those that get a gradient require it."""
    out_gradients: tuple[Tensor, ...]

    @property
    def inputs_with_grad(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.inputs if tensor.requires_grad)


@dataclass(frozen=True)
class Rival:
    name: str
    make_function: Callable[[Any], Function]
    """The function for a shape, which takes the example's inputs. Whatever it imports it imports here."""
    needs_gpu: bool = True
    """Its kernels run on a GPU, or in Triton's interpreter where they are Triton's."""
    is_slow_to_compile: bool = False
    """Takes seconds for each shape: asked for by name alone if the shape is none of our models'."""
    deviation: str = ""
    """What it computes instead, if that is not the operation at the shape: its results need not agree."""
    make_example: Callable[[Any, torch.device, torch.dtype, torch.Generator], Example] | None = None
    """Its own inputs then."""
    substitute_shape: Callable[[Any], Any] = lambda shape: shape
    """Its own shape then, for inputs and work alike."""


@dataclass(frozen=True)
class Precision:
    """Which errors of ours are counted, and beside whose. Exact is the plain function in fp64, on the same values."""

    result_names: tuple[str, ...]
    """Of the results, then of the inputs that get a gradient."""
    make_ours: Callable[[Any], Function]
    make_plain: Callable[[Any], Function]
    """What one would write with torch's own operations: products in the inputs' dtype, sums and exponentials at least in fp32
    if torch leaves the choice."""
    make_example: Callable[[Any, torch.device, torch.dtype, torch.Generator], Example] | None = None
    """Its own inputs, if a mean of the operation's would leave one number to judge by."""


@dataclass(frozen=True)
class Operation:
    name: str
    ceiling: Literal["copy", "matmul"]
    shapes: list[Any]
    """Measured: of one rank, and the rivals' own."""
    extra_shapes: list[Any]
    """Over more ranks, and of small configs: compiled for, and measured when asked for by name."""
    make_example: Callable[[Any, torch.device, torch.dtype, torch.Generator], Example]
    forward_work: Callable[[Any, int], Work]
    """Of a shape, and the bytes of an element."""
    backward_work: Callable[[Any, int], Work]
    rivals: list[Rival]
    launch_kernels: Callable[[Any], None] | None = field(default=None)
    """Launches all kernels of ours on meta tensors; None if we have none."""
    precision: Precision | None = field(default=None)
    """None if we have nothing of our own."""

    def work(self, shape: Any, direction: Direction, element_bytes: int) -> Work:
        """Both directions together are their sum: autograd asks for the result before it brings its gradient."""
        forward, backward = self.forward_work(shape, element_bytes), self.backward_work(shape, element_bytes)
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def random_leaf(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Normal values that get a gradient."""
    return random_tensor(shape, device, dtype, generator, scale).requires_grad_()


def random_tensor(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, generator=generator).mul_(scale)


def upcast(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compile_function(function: Function) -> Function:
    """By torch.compile, for one shape."""
    return torch.compile(function, dynamic=False, fullgraph=True)
