"""The rows of one global step cut from the streams of its sources, their tensors, and the evidence of what was read.

A row of seq_len tokens takes seq_len tokens of its source in reading order; each token's target is the one after it in the
stream, so a change of seq_len re-cuts the same order and neither loses nor repeats a token. The rows that a rank has of one
source lie one after the other in its reading order: they are read as one span, since a call costs more than its tokens.
Everything stays in the stored type until all tokens of a batch are widened at once, to the 32 bits that the device is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor
from xxhash import xxh3_64_intdigest

from tandem.trainer.data.shuffle import Order
from tandem.trainer.data.token_stream import Piece, Stream

INDEX, PIECE = Struct("<q"), Struct("<qqq")
HASHES = 1 << 64
"""Hashes of rows are added modulo this."""


@dataclass(frozen=True)
class Evidence:
    """Sums, over this rank's rows of a step, of a hash of each; added over all ranks they are a fact of the run."""

    ranges: int
    """Of what was read: the row's index in the global step, its source, and the pieces of shards it came from."""
    tokens: int
    """Of what is fed: the row's index in the global step and its tokens, in the type they are stored in."""


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's rows of one global step."""

    packed: Int32[Tensor, "3 rows seq"]
    """Tokens, targets and documents in one piece, as they go to the device; `unpacked` tells them apart."""
    cursor: dict[str, int]
    """Where each source stands in its reading order after this step; a fact of the run, not of a rank."""
    evidence: Evidence | None = None
    """None for rows that nothing is learned from."""

    @property
    def tokens(self) -> Int64[Tensor, "rows seq"]:
        return self.packed[0].long()

    @property
    def targets(self) -> Int64[Tensor, "rows seq"]:
        """Next token of the stream at each position, also across the end of a row or block."""
        return self.packed[1].long()

    @property
    def documents(self) -> Int32[Tensor, "rows seq"]:
        """Index of the document within the row, from 0; EOS belongs to the document it ends."""
        return self.packed[2]


def unpacked(
    packed: Int32[Tensor, "3 rows seq"],
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"], Int32[Tensor, "rows seq"]]:
    """Tokens, targets and documents of these rows, as a model takes them, on the device of the rows."""
    tokens, targets = packed[:2].long()
    return tokens, targets, packed[2]


class Span(NamedTuple):
    """Rows of one source that follow one another in its reading order."""

    source: str
    position: int
    rows: np.ndarray
    """Where they stand in the batch."""


class Cut(NamedTuple):
    """What is to be read for a batch."""

    spans: list[Span]
    rows: int
    seq_len: int
    cursor: dict[str, int]
    first_row: int | None
    """Index of the batch's first row in the global step; None for rows that need no evidence."""


class Read(NamedTuple):
    """A span as it was read."""

    pair: np.ndarray
    """[2, rows, seq] tokens and their targets, in the stored type."""
    breaks: list[int]
    """Of the tokens one after the other, where a run of the stream begins."""
    pieces: list[Piece]


class Source:
    """One split of a corpus, in the order a run reads it; what its stream leaves out is stepped over."""

    def __init__(self, stream: Stream, order: Order):
        self.stream, self._order = stream, order
        self._window: int | None = None

    def after(self, position: int, count: int) -> int:
        """The position in reading order behind the `count` tokens from `position` on."""
        return self._runs(position, count)[1] if count and self.stream.left_out else position + count

    def left_out(self, position: int) -> int:
        """How many of the positions before this one are left out."""
        if not self.stream.left_out:
            return 0
        tokens, (window, _) = self.stream.tokens, self._order.window(position)
        epochs, inside = divmod(window, tokens)
        before = [(epochs * tokens, inside), *self._order.runs(window, position - window)]
        kept = sum(count for run in before for _, count in self.stream.kept(*run))
        return position - epochs * self.stream.kept_tokens - kept

    def soon(self, position: int) -> None:
        """The shards of the window behind the one around the position are made ready, once for each window."""
        first, tokens = self._order.window(position)
        if first != self._window:
            self._window = first
            self.stream.soon(first + tokens, tokens)

    def read(self, position: int, rows: int, seq_len: int) -> Read:
        """`rows` rows, the first of which begins at `position`."""
        pieces: list[Piece] = []
        tokens, targets, breaks, start = [], [], [], 0
        for first, count in self._runs(position, rows * seq_len)[0]:
            taken, run = self.stream.run(first, count)
            tokens.append(run[:-1])
            targets.append(run[1:])
            breaks.append(start)
            start += count
            pieces += taken
        pair = np.empty((2, start), self.stream.dtype)
        np.concatenate(tokens, out=pair[0])
        np.concatenate(targets, out=pair[1])
        return Read(pair.reshape(2, rows, seq_len), breaks, merged(pieces))

    def _runs(self, position: int, count: int) -> tuple[list[tuple[int, int]], int]:
        """The runs of the stream that the next `count` tokens are, and the position behind them."""
        if not self.stream.left_out:
            return self._order.runs(position, count), position + count
        found: list[tuple[int, int]] = []
        wanted = count
        while True:
            for start, length in self._order.runs(position, wanted):
                for first, kept in self.stream.kept(start, length):
                    taken = min(kept, count)
                    if found and sum(found[-1]) == first:  # asked for in two turns, or in two shards
                        found[-1] = (found[-1][0], found[-1][1] + taken)
                    else:
                        found.append((first, taken))
                    count -= taken
                    if not count:
                        return found, position + first + taken - start
                position += length
            wanted *= 2


def batch(sources: Mapping[str, Source], cut: Cut, eos_id: int) -> Batch:
    """The rows of the cut as tensors, and their evidence."""
    reads = [sources[span.source].read(span.position, len(span.rows), cut.seq_len) for span in cut.spans]
    if len(reads) == 1:
        pair, breaks = reads[0].pair, reads[0].breaks
    else:
        pair, breaks = np.empty((2, cut.rows, cut.seq_len), np.result_type(*(read.pair for read in reads))), []
        for span, read in zip(cut.spans, reads, strict=True):
            pair[:, span.rows] = read.pair
            breaks += [int(span.rows[at // cut.seq_len]) * cut.seq_len + at % cut.seq_len for at in read.breaks]
    packed = np.empty((3, cut.rows, cut.seq_len), np.int32)
    packed[:2] = pair
    packed[2] = documents_of(pair[0], breaks, eos_id)
    found = None if cut.first_row is None else evidence(cut, reads, packed[0], cut.first_row)
    return Batch(torch.from_numpy(packed), cut.cursor, found)


def documents_of(tokens: np.ndarray, breaks: list[int], eos_id: int) -> np.ndarray:
    """The document of each token, counted in its row. What follows a break is another document, whatever stands before it."""
    rows, seq_len = tokens.shape
    ends = tokens.reshape(-1) == eos_id
    ends[seq_len - 1 :: seq_len] = True
    for at in breaks:
        ends[at - 1] = True  # before the first of all: the last of all, which is an end
    lasts = ends.nonzero()[0]
    lengths = lasts.copy()
    lengths[0] += 1
    lengths[1:] -= lasts[:-1]
    row_firsts = lasts.searchsorted(np.arange(0, tokens.size, seq_len))
    numbers = np.arange(len(lasts)) - row_firsts[lasts // seq_len]
    # Every document's number repeated: many times as fast as a running sum over the tokens.
    return numbers.astype(np.int32).repeat(lengths).reshape(rows, seq_len)


def evidence(cut: Cut, reads: list[Read], tokens: np.ndarray, first_row: int) -> Evidence:
    """The sums for the batch's tokens, which are the very ones it is fed: a row put in the wrong place since it was read
    is not the row that its place should have.
    """
    stored = {dtype: tokens.astype(dtype) for dtype in {read.pair.dtype for read in reads}}
    of_ranges = of_tokens = 0
    for span, read in zip(cut.spans, reads, strict=True):
        fed, name = stored[read.pair.dtype], span.source.encode() + b"\0"
        for row, pieces in zip(span.rows.tolist(), packed(read.pieces, cut.seq_len), strict=True):
            index = INDEX.pack(first_row + row)
            of_ranges += xxh3_64_intdigest(index + name + pieces)
            of_tokens += xxh3_64_intdigest(index + fed[row].tobytes())
    return Evidence(of_ranges % HASHES, of_tokens % HASHES)


def packed(pieces: list[Piece], seq_len: int) -> list[bytes]:
    """The bytes of each row's pieces: these pieces, cut at the ends of rows."""
    rows: list[bytes] = []
    room = 0
    for shard, first, count in pieces:
        end = first + count
        while first < end:
            if not room:
                rows.append(b"")
                room = seq_len
            taken = min(end - first, room)
            rows[-1] += PIECE.pack(shard, first, taken)
            first += taken
            room -= taken
    return rows


def merged(pieces: list[Piece]) -> list[Piece]:
    """The same tokens in the fewest pieces."""
    merged = pieces[:1]
    for shard, first, count in pieces[1:]:
        last_shard, last_first, last_count = merged[-1]
        if shard == last_shard and first == last_first + last_count:
            merged[-1] = (shard, last_first, last_count + count)
        else:
            merged.append((shard, first, count))
    return merged
