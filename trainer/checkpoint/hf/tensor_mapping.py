"""Map our tensors to those of a Hugging Face folder. Export (`to_hf_tensor`) and import (`from_hf_tensors`) use the same table
and therefore cannot disagree. The tables of the model families are in `btlm` and `stablelm`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, promote_types

TensorReader = Callable[[str], Tensor]
"""Maps our name of a tensor to the whole tensor, without padding, on the CPU."""


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a folder, which holds one of our tensors or a part of it."""

    hf_name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    """Index of the part in our tensor, viewed as `TensorMapping.view`; () is the whole tensor."""
    permutation: tuple[int, ...] = ()
    """The order of the part's dims in the folder; () keeps ours."""
    is_transposed: bool = False
    """Whether the folder stores [in, out]."""


@dataclass(frozen=True)
class TensorMapping:
    """One of our tensors."""

    name: str
    shape: tuple[int, ...]
    """The shape without padding."""
    view: tuple[int, ...]
    """The shape to view our tensor in, so that an index selects each part."""
    hf_tensors: tuple[HFTensor, ...]
    """Together they hold every element once."""


def identity_mapping(name: str, hf_name: str, *shape: int) -> TensorMapping:
    """Map a tensor that is the same on both sides."""
    return TensorMapping(name, shape, shape, (HFTensor(hf_name, shape),))


def stacked_mapping(name: str, hf_names: Iterable[str], *shape: int, is_transposed: bool = False) -> TensorMapping:
    """Map a tensor whose first dim stacks several tensors of the folder. `shape` is that of one part of our tensor."""
    hf_shape = shape[::-1] if is_transposed else shape
    parts = tuple(HFTensor(each, hf_shape, (part,), is_transposed=is_transposed) for part, each in enumerate(hf_names))
    return TensorMapping(name, (len(parts), *shape), (len(parts), *shape), parts)


def to_hf_tensor(mapping: TensorMapping, hf_tensor: HFTensor, tensor: Tensor) -> Tensor:
    """Make one tensor of the folder from our whole tensor."""
    part = tensor.view(mapping.view)[hf_tensor.index]
    if hf_tensor.permutation:
        part = part.permute(hf_tensor.permutation)
    return part.reshape(hf_tensor.shape[::-1]).t() if hf_tensor.is_transposed else part.reshape(hf_tensor.shape)


def from_hf_tensors(mapping: TensorMapping, read_hf_tensor: TensorReader) -> Tensor:
    """Make our whole tensor from the folder's tensors, in a dtype that rounds none of them."""
    parts = [read_hf_tensor(piece.hf_name) for piece in mapping.hf_tensors]
    tensor = parts[0].new_empty(mapping.view, dtype=reduce(promote_types, (part.dtype for part in parts)))
    for piece, part in zip(mapping.hf_tensors, parts, strict=True):
        target = tensor[piece.index]
        if piece.permutation:
            target = target.permute(piece.permutation)
        target.copy_((part.t() if piece.is_transposed else part).reshape(target.shape))
    return tensor.view(mapping.shape)
