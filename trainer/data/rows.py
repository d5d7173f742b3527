"""The rows of one global step cut from the streams of its sources, and their tensors.

A row of seq_len tokens takes seq_len tokens of its source in reading order; each token's target is the one after it in the
stream, so a change of seq_len re-cuts the same order and neither loses nor repeats a token. Rows stay in the stored type
until the last moment: widening in the reading thread would make it hand over four times the bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from trainer.data.order import Order
from trainer.data.stream import Stream


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's rows of one global step."""

    tokens: Int64[Tensor, "rows seq"]
    targets: Int64[Tensor, "rows seq"]
    """Next token of the stream at each position, also across the end of a row or block."""
    documents: Int32[Tensor, "rows seq"]
    """Index of the document within the row, from 0; EOS belongs to the document it ends."""
    cursor: dict[str, int]
    """Tokens taken from each source after this step; a fact of the run, not of a rank."""


@dataclass(frozen=True)
class Place:
    """Where a row begins."""

    source: str
    position: int


def places(sources: Sequence[str], cursor: Mapping[str, int], seq_len: int) -> tuple[list[Place], dict[str, int]]:
    """The place of each row of a step that starts at `cursor`, and the cursor after the step."""
    after, rows = dict(cursor), []
    for source in sources:
        position = after.get(source, 0)
        rows.append(Place(source, position))
        after[source] = position + seq_len
    return rows, after


class Source:
    """One split of a corpus, in the order a run reads it."""

    def __init__(self, stream: Stream, order: Order):
        self._stream, self._order = stream, order

    def row(self, position: int, seq_len: int) -> tuple[np.ndarray, list[int]]:
        """[2, seq_len] tokens and their targets, and the columns after the first where a run of the stream begins."""
        runs = self._order.runs(position, seq_len)
        read = [self._stream.read(start, count + 1) for start, count in runs]
        tokens, targets = np.concatenate([run[:-1] for run in read]), np.concatenate([run[1:] for run in read])
        return np.stack([tokens, targets]), list(accumulate(count for _, count in runs))[:-1]


@dataclass(frozen=True)
class Block:
    """Rows as they come from the reading thread."""

    rows: np.ndarray
    """[rows, 2, seq] tokens and targets in the stored type."""
    breaks: list[list[int]]
    """Of each row, the columns where a new run of the stream begins."""


def cut(sources: Mapping[str, Source], rows: Sequence[Place], seq_len: int) -> Block:
    """The rows at these places."""
    read = [sources[row.source].row(row.position, seq_len) for row in rows]
    return Block(np.stack([row for row, _ in read]), [breaks for _, breaks in read])


def batch(block: Block, eos_id: int, cursor: dict[str, int]) -> Batch:
    """The tensors of a block. What follows a break is another document, whatever stands before it."""
    wide = torch.from_numpy(block.rows.astype(np.int64))
    tokens, targets = wide[:, 0].contiguous(), wide[:, 1].contiguous()
    begins = torch.zeros_like(tokens, dtype=torch.int32)
    begins[:, 1:] = (tokens[:, :-1] == eos_id).to(torch.int32)
    for row, breaks in enumerate(block.breaks):
        begins[row, breaks] = 1
    return Batch(tokens, targets, begins.cumsum(1, dtype=torch.int32), cursor)
