"""What a table of names says, and how it is read: each `TensorMapping` is one of our tensors, each `HFTensor`
the tensor of a Hugging Face folder that holds a part of it. A mapping is pure data; `to_hf_tensor` reads it
outwards and `from_hf_tensors` inwards, so export and import cannot disagree. Nothing here knows a family, a
file, or torch beyond its tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, promote_types

TensorReader = Callable[[str], Tensor]
"""Our name of a tensor -> the whole tensor at its true shape, on the CPU."""


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a folder."""

    hf_name: str
    """Its name there."""
    shape: tuple[int, ...]
    """Its shape there."""
    index: tuple[int | slice, ...] = ()
    """The part of our tensor, seen at `TensorMapping.view`, that it holds; () is all of it."""
    permutation: tuple[int, ...] = ()
    """The order of the part's dims there; () keeps ours."""
    is_transposed: bool = False
    """Stored [in, out]."""


@dataclass(frozen=True)
class TensorMapping:
    """One of our tensors."""

    name: str
    """Its global name."""
    shape: tuple[int, ...]
    """Its true shape."""
    view: tuple[int, ...]
    """The shape at which its pieces are simple selections."""
    hf_tensors: tuple[HFTensor, ...]
    """Together they hold every element once."""


def identity_mapping(name: str, hf_name: str, *shape: int) -> TensorMapping:
    """The row of a tensor that is the same on both sides."""
    return TensorMapping(name, shape, shape, (HFTensor(hf_name, shape),))


def to_hf_tensor(mapping: TensorMapping, hf_tensor: HFTensor, tensor: Tensor) -> Tensor:
    """The tensor `hf_tensor` of the folder, from our whole tensor."""
    part = tensor.view(mapping.view)[hf_tensor.index]
    if hf_tensor.permutation:
        part = part.permute(hf_tensor.permutation)
    return part.reshape(hf_tensor.shape[::-1]).t() if hf_tensor.is_transposed else part.reshape(hf_tensor.shape)


def from_hf_tensors(mapping: TensorMapping, read_hf_tensor: TensorReader) -> Tensor:
    """Our whole tensor, from the folder's that `read_hf_tensor` finds by their names, in a dtype that rounds none of them."""
    parts = [read_hf_tensor(piece.hf_name) for piece in mapping.hf_tensors]
    tensor = parts[0].new_empty(mapping.view, dtype=reduce(promote_types, (part.dtype for part in parts)))
    for piece, part in zip(mapping.hf_tensors, parts, strict=True):
        target = tensor[piece.index]
        if piece.permutation:
            target = target.permute(piece.permutation)
        target.copy_((part.t() if piece.is_transposed else part).reshape(target.shape))
    return tensor.view(mapping.shape)
