"""What a table of names says, and how it is read: each `Row` is one of our tensors, each `Piece` the tensor
of a Hugging Face folder that holds a part of it. A row is pure data; `cut` reads it outwards and `join`
inwards, so export and import cannot disagree. Nothing here knows a family, a file, or torch beyond its tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, promote_types

Read = Callable[[str], Tensor]
"""Our name of a tensor -> the whole tensor at its true shape, on the CPU."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a folder."""

    theirs: str
    """Its name there."""
    shape: tuple[int, ...]
    """Its shape there."""
    index: tuple[int | slice, ...] = ()
    """The part of our tensor, seen at `Row.view`, that it holds; () is all of it."""
    axes: tuple[int, ...] = ()
    """The order of the part's dims there; () keeps ours."""
    transposed: bool = False
    """Stored [in, out]."""


@dataclass(frozen=True)
class Row:
    """One of our tensors."""

    ours: str
    """Its global name."""
    shape: tuple[int, ...]
    """Its true shape."""
    view: tuple[int, ...]
    """The shape at which its pieces are simple selections."""
    pieces: tuple[Piece, ...]
    """Together they hold every element once."""


def whole(ours: str, theirs: str, *shape: int) -> Row:
    """The row of a tensor that is the same on both sides."""
    return Row(ours, shape, shape, (Piece(theirs, shape),))


def cut(row: Row, piece: Piece, ours: Tensor) -> Tensor:
    """The tensor `piece` of the folder, from our whole tensor."""
    part = ours.view(row.view)[piece.index]
    if piece.axes:
        part = part.permute(piece.axes)
    return part.reshape(piece.shape[::-1]).t() if piece.transposed else part.reshape(piece.shape)


def join(row: Row, read: Read) -> Tensor:
    """Our whole tensor, from the folder's tensors that `read` finds by their names, in a dtype that rounds none of them."""
    parts = [read(piece.theirs) for piece in row.pieces]
    ours = parts[0].new_empty(row.view, dtype=reduce(promote_types, (part.dtype for part in parts)))
    for piece, part in zip(row.pieces, parts, strict=True):
        hole = ours[piece.index]
        if piece.axes:
            hole = hole.permute(piece.axes)
        hole.copy_((part.t() if piece.transposed else part).reshape(hole.shape))
    return ours.view(row.shape)
