"""Places in a source's reading order as ranges of tokens of its shards, for whole stretches at a time.

This says a second time, on purpose, what `data.order` and `data.stream` do one row at a time: an audit that
asked the reader where it had read would find every mistake of the reader right. Only numpy arrays and a manifest are
needed; no file is touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tandem.trainer.data.manifest import Split

Ints = np.ndarray
"""int64, one dim."""


@dataclass(frozen=True)
class Pieces:
    """Runs of neighbouring tokens within one shard, in reading order; arrays of one length."""

    position: Ints
    """In the reading order, where the piece begins."""
    shard: Ints
    """Index in the manifest's split."""
    first: Ints
    """Its first token within the shard."""
    tokens: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, chosen: np.ndarray) -> Pieces:
        """Those that a mask or indices choose."""
        return Pieces(self.position[chosen], self.shard[chosen], self.first[chosen], self.tokens[chosen])


class Expansion:
    """The reading order of one source."""

    def __init__(self, split: Split, *, name: str, seed: int, block_tokens: int, window_tokens: int):
        self.epoch_tokens = split.tokens
        self.files = [shard.file for shard in split.shards]
        self.shard_tokens = np.array([shard.tokens for shard in split.shards], np.int64)
        self._name, self._seed = name, seed
        self._block_tokens = block_tokens
        self._blocks = split.tokens // block_tokens if block_tokens else 0
        self._window_blocks = max(1, window_tokens // block_tokens) if block_tokens else 1
        self._epoch = lru_cache(maxsize=4)(self._shard_order)
        self._window = lru_cache(maxsize=8)(self._block_order)

    def pieces(self, start: int, end: int) -> Pieces:
        """What places [start, end) are, across blocks, shards and epochs."""
        epochs = range(start // self.epoch_tokens, -(-end // self.epoch_tokens))
        return end_to_end([self._in_epoch(epoch, start, end) for epoch in epochs if start < end])

    def named(self, pieces: Pieces, limit: int = 8) -> list[str]:
        """The pieces as FILE:FIRST+TOKENS, neighbours as one; `…` stands for those after the first `limit`."""
        joined = touching(pieces)
        ranges = zip(joined.shard[:limit], joined.first[:limit], joined.tokens[:limit], strict=True)
        words = [f"{self.files[shard]}:{first}+{tokens}" for shard, first, tokens in ranges]
        return words + ["…"] * (len(joined) > limit)

    def _in_epoch(self, epoch: int, start: int, end: int) -> Pieces:
        origin = epoch * self.epoch_tokens
        begins, lengths, stream = self._blocks_of(epoch, max(start - origin, 0), min(end - origin, self.epoch_tokens))
        order, borders = self._epoch(epoch)
        place = np.searchsorted(borders, stream, "right") - 1
        count = np.searchsorted(borders, stream + lengths - 1, "right") - place
        parent = np.repeat(np.arange(len(begins)), count)
        place = place[parent] + np.arange(len(parent)) - (np.cumsum(count) - count)[parent]
        first = np.maximum(stream[parent], borders[place])
        tokens = np.minimum((stream + lengths)[parent], borders[place + 1]) - first
        position = origin + begins[parent] + first - stream[parent]
        return Pieces(position, order[place], first - borders[place], tokens).where(tokens > 0)

    def _blocks_of(self, epoch: int, low: int, high: int) -> tuple[Ints, Ints, Ints]:
        """Places [low, high) of an epoch cut at blocks: where each part begins, its tokens, where in the stream they are."""
        size = self._block_tokens or self.epoch_tokens
        begins = np.arange(low // size * size, high, size, dtype=np.int64)
        begins[0] = low
        lengths = np.diff(np.append(begins, high))
        block, inside = np.divmod(begins, size)
        whole = np.flatnonzero(block < self._blocks)  # the tail of an epoch stays where it is
        window = block[whole] // self._window_blocks
        for here in np.split(whole, np.flatnonzero(np.diff(window)) + 1) if len(whole) else []:
            index = int(block[here[0]]) // self._window_blocks
            first = index * self._window_blocks
            block[here] = first + self._window(epoch, index)[block[here] - first]
        return begins, lengths, block * size + inside

    def _shard_order(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in the order of the epoch, and the token of the epoch where each begins, with the epoch's end."""
        digests = [self._digest(f"{epoch}/{index}") for index in range(len(self.files))]
        order = np.array(sorted(range(len(self.files)), key=digests.__getitem__), np.int64)
        return order, np.concatenate([[0], np.cumsum(self.shard_tokens[order])])

    def _block_order(self, epoch: int, window: int) -> Ints:
        size = min(self._window_blocks, self._blocks - window * self._window_blocks)
        key = int.from_bytes(self._digest(f"{epoch}/blocks/{window}")[:8], "little")
        return np.argsort(_splitmix(np.arange(size, dtype=np.uint64) + np.uint64(key)), kind="stable")

    def _digest(self, what: str) -> bytes:
        return hashlib.sha256(f"{self._seed}/{self._name}/{what}".encode()).digest()


def end_to_end(parts: list[Pieces]) -> Pieces:
    """All of them, in the order given."""
    fields = zip(*((part.position, part.shard, part.first, part.tokens) for part in parts), strict=True)
    return Pieces(*map(np.concatenate, fields)) if parts else Pieces(*[np.empty(0, np.int64)] * 4)


def rows(pieces: Pieces, seq_len: int) -> tuple[Pieces, Ints]:
    """The pieces laid end to end, cut into rows and otherwise joined where they touch; and where each row's first piece is,
    with the end. The last row may be short.
    """
    ends = np.cumsum(pieces.tokens)
    begins, total = ends - pieces.tokens, int(pieces.tokens.sum())
    bounds = np.union1d(begins, np.arange(0, total, seq_len))
    parent = np.searchsorted(begins, bounds, "right") - 1
    moved = bounds - begins[parent]
    cut = pieces.where(parent)
    cut = Pieces(cut.position + moved, cut.shard, cut.first + moved, np.diff(np.append(bounds, total)))
    row = bounds // seq_len
    return touching(cut, row), _row_starts(cut, row)


def touching(pieces: Pieces, row: Ints | None = None) -> Pieces:
    """Pieces of the same shard, and the same row, that follow one another without a gap, as one."""
    starts = np.flatnonzero(_breaks(pieces, row))
    tokens = np.add.reduceat(pieces.tokens, starts) if len(starts) else pieces.tokens
    return Pieces(pieces.position[starts], pieces.shard[starts], pieces.first[starts], tokens)


def _breaks(pieces: Pieces, row: Ints | None) -> np.ndarray:
    breaks = np.ones(len(pieces), bool)
    breaks[1:] = (pieces.shard[1:] != pieces.shard[:-1]) | (pieces.first[1:] != pieces.first[:-1] + pieces.tokens[:-1])
    if row is not None:
        breaks[1:] |= row[1:] != row[:-1]
    return breaks


def _row_starts(cut: Pieces, row: Ints) -> Ints:
    kept = row[_breaks(cut, row)]
    return np.searchsorted(kept, np.arange(int(row[-1]) + 2 if len(row) else 1))


def _splitmix(values: np.ndarray) -> np.ndarray:
    """Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014; arithmetic modulo 2^64."""
    for shift, factor in ((None, 0x9E3779B97F4A7C15), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        values = values if shift is None else values ^ (values >> np.uint64(shift))
        values = values if factor is None else values * np.uint64(factor)
    return values
