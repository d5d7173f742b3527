"""The table that maps our tensors to those of a Hugging Face folder. Nothing here needs torch.

`btlm` and `stablelm` have the rows of the model families, and `tensor_conversion` applies them.
"""

from collections.abc import Iterable
from dataclasses import dataclass


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
