"""Places in a source's reading order as ranges of tokens of its shards, for whole stretches at a time.

This says a second time, on purpose, what `data.shuffle` and `data.token_stream` do one row at a time: an audit that
asked the reader where it had read would find every mistake of the reader right. Only numpy arrays and a manifest are
needed; no file is touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tandem.trainer.data.manifest import CorpusSplit

IntArray = np.ndarray
"""int64, one dim."""


@dataclass(frozen=True)
class ShardRanges:
    """Runs of neighbouring tokens within one shard, in reading order; arrays of one length."""

    position: IntArray
    """In the reading order, where the piece begins."""
    shard_index: IntArray
    """Index in the manifest's split."""
    first_token: IntArray
    """Its first token within the shard."""
    tokens: IntArray

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, selection: np.ndarray) -> ShardRanges:
        """Those that a mask or indices choose."""
        return ShardRanges(
            self.position[selection], self.shard_index[selection], self.first_token[selection], self.tokens[selection]
        )


class ReadingOrder:
    """The reading order of one source."""

    def __init__(
        self, split: CorpusSplit, *, source: str, seed: int, shuffle_block_tokens: int, shuffle_window_tokens: int
    ):
        self.epoch_tokens = split.tokens
        self.shard_files = [shard.file for shard in split.shards]
        self.shard_tokens = np.array([shard.tokens for shard in split.shards], np.int64)
        self._source, self._seed = source, seed
        self._shuffle_block_tokens = shuffle_block_tokens
        self._num_blocks = split.tokens // shuffle_block_tokens if shuffle_block_tokens else 0
        self._window_blocks = max(1, shuffle_window_tokens // shuffle_block_tokens) if shuffle_block_tokens else 1
        self._cached_shard_order = lru_cache(maxsize=4)(self._shard_order)
        self._cached_block_order = lru_cache(maxsize=8)(self._block_order)

    def shard_ranges(self, start: int, end: int) -> ShardRanges:
        """What places [start, end) are, across blocks, shards and epochs."""
        epochs = range(start // self.epoch_tokens, -(-end // self.epoch_tokens))
        return concatenate_ranges([self._epoch_ranges(epoch, start, end) for epoch in epochs if start < end])

    def shard_range_names(self, ranges: ShardRanges, limit: int = 8) -> list[str]:
        """The pieces as FILE:FIRST+TOKENS, neighbours as one; `…` stands for those after the first `limit`."""
        merged = merge_adjacent(ranges)
        entries = zip(merged.shard_index[:limit], merged.first_token[:limit], merged.tokens[:limit], strict=True)
        words = [f"{self.shard_files[shard]}:{first}+{tokens}" for shard, first, tokens in entries]
        return words + ["…"] * (len(merged) > limit)

    def _epoch_ranges(self, epoch: int, start: int, end: int) -> ShardRanges:
        epoch_start = epoch * self.epoch_tokens
        slice_starts, lengths, stream_starts = self._block_slices(
            epoch, max(start - epoch_start, 0), min(end - epoch_start, self.epoch_tokens)
        )
        order, shard_starts = self._cached_shard_order(epoch)
        order_index = np.searchsorted(shard_starts, stream_starts, "right") - 1
        count = np.searchsorted(shard_starts, stream_starts + lengths - 1, "right") - order_index
        parent = np.repeat(np.arange(len(slice_starts)), count)
        order_index = order_index[parent] + np.arange(len(parent)) - (np.cumsum(count) - count)[parent]
        first = np.maximum(stream_starts[parent], shard_starts[order_index])
        tokens = np.minimum((stream_starts + lengths)[parent], shard_starts[order_index + 1]) - first
        position = epoch_start + slice_starts[parent] + first - stream_starts[parent]
        return ShardRanges(position, order[order_index], first - shard_starts[order_index], tokens).select(tokens > 0)

    def _block_slices(self, epoch: int, low: int, high: int) -> tuple[IntArray, IntArray, IntArray]:
        """Places [low, high) of an epoch cut at blocks: where each part begins, its tokens, where in the stream they are."""
        size = self._shuffle_block_tokens or self.epoch_tokens
        slice_starts = np.arange(low // size * size, high, size, dtype=np.int64)
        slice_starts[0] = low
        lengths = np.diff(np.append(slice_starts, high))
        block, block_offset = np.divmod(slice_starts, size)
        shuffled = np.flatnonzero(block < self._num_blocks)  # the tail of an epoch stays where it is
        window = block[shuffled] // self._window_blocks
        for in_window in np.split(shuffled, np.flatnonzero(np.diff(window)) + 1) if len(shuffled) else []:
            index = int(block[in_window[0]]) // self._window_blocks
            first = index * self._window_blocks
            block[in_window] = first + self._cached_block_order(epoch, index)[block[in_window] - first]
        return slice_starts, lengths, block * size + block_offset

    def _shard_order(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Shards in the order of the epoch, and the token of the epoch where each begins, with the epoch's end."""
        digests = [self._digest(f"{epoch}/{index}") for index in range(len(self.shard_files))]
        order = np.array(sorted(range(len(self.shard_files)), key=digests.__getitem__), np.int64)
        return order, np.concatenate([[0], np.cumsum(self.shard_tokens[order])])

    def _block_order(self, epoch: int, window: int) -> IntArray:
        size = min(self._window_blocks, self._num_blocks - window * self._window_blocks)
        key = int.from_bytes(self._digest(f"{epoch}/blocks/{window}")[:8], "little")
        return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) + np.uint64(key)), kind="stable")

    def _digest(self, label: str) -> bytes:
        return hashlib.sha256(f"{self._seed}/{self._source}/{label}".encode()).digest()


def concatenate_ranges(parts: list[ShardRanges]) -> ShardRanges:
    """All of them, in the order given."""
    fields = zip(*((part.position, part.shard_index, part.first_token, part.tokens) for part in parts), strict=True)
    return ShardRanges(*map(np.concatenate, fields)) if parts else ShardRanges(*[np.empty(0, np.int64)] * 4)


def cut_rows(ranges: ShardRanges, seq_len: int) -> tuple[ShardRanges, IntArray]:
    """The pieces laid end to end, cut into rows and otherwise joined where they touch; and where each row's first piece is,
    with the end. The last row may be short.
    """
    range_ends = np.cumsum(ranges.tokens)
    range_starts, total = range_ends - ranges.tokens, int(ranges.tokens.sum())
    bounds = np.union1d(range_starts, np.arange(0, total, seq_len))
    parent = np.searchsorted(range_starts, bounds, "right") - 1
    offsets = bounds - range_starts[parent]
    cut = ranges.select(parent)
    cut = ShardRanges(
        cut.position + offsets, cut.shard_index, cut.first_token + offsets, np.diff(np.append(bounds, total))
    )
    row = bounds // seq_len
    return merge_adjacent(cut, row), _row_starts(cut, row)


def merge_adjacent(ranges: ShardRanges, row_index: IntArray | None = None) -> ShardRanges:
    """Pieces of the same shard, and the same row, that follow one another without a gap, as one."""
    starts = np.flatnonzero(_is_range_start(ranges, row_index))
    tokens = np.add.reduceat(ranges.tokens, starts) if len(starts) else ranges.tokens
    return ShardRanges(ranges.position[starts], ranges.shard_index[starts], ranges.first_token[starts], tokens)


def _is_range_start(ranges: ShardRanges, row_index: IntArray | None) -> np.ndarray:
    is_start = np.ones(len(ranges), bool)
    is_start[1:] = (ranges.shard_index[1:] != ranges.shard_index[:-1]) | (
        ranges.first_token[1:] != ranges.first_token[:-1] + ranges.tokens[:-1]
    )
    if row_index is not None:
        is_start[1:] |= row_index[1:] != row_index[:-1]
    return is_start


def _row_starts(ranges: ShardRanges, row_index: IntArray) -> IntArray:
    kept = row_index[_is_range_start(ranges, row_index)]
    return np.searchsorted(kept, np.arange(int(row_index[-1]) + 2 if len(row_index) else 1))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014; arithmetic modulo 2^64."""
    for shift, factor in ((None, 0x9E3779B97F4A7C15), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        values = values if shift is None else values ^ (values >> np.uint64(shift))
        values = values if factor is None else values * np.uint64(factor)
    return values
