"""The rows of one global step cut from the streams of its sources, and their tensors.

A row of seq_len tokens takes seq_len tokens of its source's stream; its targets look one token further, into
what the next row of that source begins with, so a change of seq_len re-cuts the same stream and neither loses
nor repeats a token. Rows stay in the stored type until the last moment: widening in the reading thread would
make it hand over four times the bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from trainer.data.stream import Stream


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's rows of one global step."""

    tokens: Int64[Tensor, "rows seq"]
    targets: Int64[Tensor, "rows seq"]
    """Next token of the stream at each position, also across the row's end."""
    documents: Int32[Tensor, "rows seq"]
    """Index of the document within the row, from 0; EOS belongs to the document it ends."""
    cursor: dict[str, int]
    """Tokens taken from each source after this step; a fact of the run, not of a rank."""


@dataclass(frozen=True)
class Place:
    """Where a row begins."""

    source: str
    position: int


def places(
    sources: Sequence[str], cursor: Mapping[str, int], seq_len: int
) -> tuple[list[Place], dict[str, int]]:
    """The place of each row of a step that starts at `cursor`, and the cursor after the step."""
    after, rows = dict(cursor), []
    for source in sources:
        position = after.get(source, 0)
        rows.append(Place(source, position))
        after[source] = position + seq_len
    return rows, after


def cut(streams: Mapping[str, Stream], rows: Sequence[Place], seq_len: int) -> np.ndarray:
    """[rows, seq_len + 1] tokens in the stored type: each row and the token after it."""
    return np.stack([streams[row.source].read(row.position, seq_len + 1) for row in rows])


def batch(block: np.ndarray, eos_id: int, cursor: dict[str, int]) -> Batch:
    """The tensors of a block from `cut`."""
    wide = torch.from_numpy(block.astype(np.int64))
    tokens = wide[:, :-1].contiguous()
    ends = (tokens == eos_id).to(torch.int32)
    documents = ends.cumsum(1, dtype=torch.int32) - ends
    return Batch(tokens, wide[:, 1:].contiguous(), documents, cursor)
