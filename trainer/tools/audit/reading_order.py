"""Map positions in a source's reading order to token ranges of its shards, many positions at a time.

This module deliberately implements the order of `data.shuffle` and `data.token_stream` a second time, because an audit that
called the loader's code would repeat the loader's mistakes. It needs only manifests and opens no file. `Sources` has the
reading orders of all sources and the shards that are skipped at the step that is replayed.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from tandem.trainer.data.manifest import CorpusSplit

IntArray = np.ndarray
"""One-dimensional, int64."""
MAX_SHOWN_TOKENS = 1 << 24
"""Limit on the tokens whose ranges are named, because a damaged ledger must not fill the memory."""


@dataclass(frozen=True)
class ShardRanges:
    """Contiguous tokens of one shard each, in reading order; arrays of equal length."""

    position: IntArray
    """Position in the reading order at which the range begins."""
    shard_index: IntArray
    """Index in the manifest's split."""
    first_token: IntArray
    """Index in the shard of the first token."""
    tokens: IntArray

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, selection: np.ndarray | slice) -> "ShardRanges":
        """Select ranges by a mask, by indices or by a slice."""
        return ShardRanges(*(each[selection] for each in vars(self).values()))


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
        """Map positions [start, end), across blocks, shards and epochs."""
        epochs = range(start // self.epoch_tokens, -(-end // self.epoch_tokens))
        return concatenate_ranges([self._epoch_ranges(epoch, start, end) for epoch in epochs if start < end])

    def shard_range_names(self, ranges: ShardRanges, limit: int = 8) -> list[str]:
        """Name ranges as FILE:FIRST+TOKENS. Adjacent ranges are merged, and `…` replaces those after the first `limit`."""
        merged = merge_adjacent(ranges)
        entries = zip(merged.shard_index[:limit], merged.first_token[:limit], merged.tokens[:limit], strict=True)
        names = [f"{self.shard_files[shard]}:{first}+{tokens}" for shard, first, tokens in entries]
        return names + ["…"] * (len(merged) > limit)

    def _epoch_ranges(self, epoch: int, start: int, end: int) -> ShardRanges:
        epoch_start = epoch * self.epoch_tokens
        low, high = max(start - epoch_start, 0), min(end - epoch_start, self.epoch_tokens)
        slice_starts, lengths, stream_starts = self._block_slices(epoch, low, high)
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
        """Cut positions [low, high) of an epoch at block borders.

        Returns the start of each slice, its length, and its start in the unshuffled stream.
        """
        size = self._shuffle_block_tokens or self.epoch_tokens
        slice_starts = np.arange(low // size * size, high, size, dtype=np.int64)
        slice_starts[0] = low
        lengths = np.diff(np.append(slice_starts, high))
        block, block_offset = np.divmod(slice_starts, size)
        shuffled = np.flatnonzero(block < self._num_blocks)  # the incomplete last block is not shuffled
        window = block[shuffled] // self._window_blocks
        for in_window in np.split(shuffled, np.flatnonzero(np.diff(window)) + 1) if len(shuffled) else []:
            index = int(block[in_window[0]]) // self._window_blocks
            first = index * self._window_blocks
            block[in_window] = first + self._cached_block_order(epoch, index)[block[in_window] - first]
        return slice_starts, lengths, block * size + block_offset

    def _shard_order(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Return the shards in the epoch's order, and the token at which each begins, followed by the number of tokens."""
        digests = [self._digest(f"{epoch}/{index}") for index in range(len(self.shard_files))]
        order = np.array(sorted(range(len(self.shard_files)), key=digests.__getitem__), np.int64)
        return order, np.concatenate([[0], np.cumsum(self.shard_tokens[order])])

    def _block_order(self, epoch: int, window: int) -> IntArray:
        size = min(self._window_blocks, self._num_blocks - window * self._window_blocks)
        key = int.from_bytes(self._digest(f"{epoch}/blocks/{window}")[:8], "little")
        return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) + np.uint64(key)), kind="stable")

    def _digest(self, label: str) -> bytes:
        return hashlib.sha256(f"{self._seed}/{self._source}/{label}".encode()).digest()


class Sources:
    """Reading orders by source. `skipped_shards` changes while the ledger is replayed."""

    def __init__(self, reading_orders: Mapping[str, ReadingOrder], validation_files: Mapping[str, Collection[str]]):
        self.reading_orders = reading_orders
        self._validation_files = validation_files
        self.skipped_shards: dict[str, set[int]] = {}
        """Source -> indices of shards."""

    def __contains__(self, source: str) -> bool:
        return source in self.reading_orders

    def skip_shard(self, source: str, file: str) -> bool:
        """Skip a shard from now on. Return whether the source has it. A validation shard does not affect the reading order."""
        files = self.reading_orders[source].shard_files if source in self else []
        if file not in files:
            return file in self._validation_files.get(source, ())
        self.skipped_shards.setdefault(source, set()).add(files.index(file))
        return True

    def shard_ranges(self, source: str, start: int, end: int) -> tuple[ShardRanges, ShardRanges]:
        """Return the ranges that the run reads at positions [start, end), and those in skipped shards."""
        ranges = self.reading_orders[source].shard_ranges(start, end)
        is_skipped = np.isin(ranges.shard_index, list(self.skipped_shards.get(source, ())))
        return ranges.select(~is_skipped), ranges.select(is_skipped)

    def shard_range_names(self, source: str, start: int, end: int) -> list[str]:
        """Name the first few ranges at positions [start, end), skipped shards included, as FILE:FIRST+TOKENS."""
        reading_order = self.reading_orders[source]
        ranges = reading_order.shard_ranges(start, min(end, start + MAX_SHOWN_TOKENS))
        return reading_order.shard_range_names(ranges)

    def step_range_names(self, read_ranges: Mapping[str, tuple[int, int]]) -> list[str]:
        """Name the first few ranges of each source that a step read."""
        return [name for source, ends in read_ranges.items() for name in self.shard_range_names(source, *ends)]

    def max_span_tokens(self, source: str, tokens: int) -> int:
        """Return an upper bound for the positions that a run advances while it reads `tokens` tokens."""
        reading_order, skipped_shards = self.reading_orders[source], list(self.skipped_shards.get(source, ()))
        skipped_tokens = int(reading_order.shard_tokens[skipped_shards].sum())
        return tokens + skipped_tokens * (tokens // max(reading_order.epoch_tokens - skipped_tokens, 1) + 2)


def concatenate_ranges(parts: list[ShardRanges]) -> ShardRanges:
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return ShardRanges(*map(np.concatenate, fields)) if parts else ShardRanges(*[np.empty(0, np.int64)] * 4)


def cut_rows(ranges: ShardRanges, seq_len: int) -> tuple[ShardRanges, IntArray]:
    """Cut ranges into rows of `seq_len` tokens and merge adjacent ranges of a row. The last row can be short.

    Returns the ranges, and the index of each row's first range, followed by the number of ranges.
    """
    range_ends = np.cumsum(ranges.tokens)
    range_starts, total = range_ends - ranges.tokens, int(ranges.tokens.sum())
    bounds = np.union1d(range_starts, np.arange(0, total, seq_len))
    parent = np.searchsorted(range_starts, bounds, "right") - 1
    offsets = bounds - range_starts[parent]
    cut = ranges.select(parent)
    tokens = np.diff(np.append(bounds, total))
    cut = ShardRanges(cut.position + offsets, cut.shard_index, cut.first_token + offsets, tokens)
    merged = merge_adjacent(cut, bounds // seq_len)
    rows = (np.cumsum(merged.tokens) - merged.tokens) // seq_len
    return merged, np.searchsorted(rows, np.arange(-(-total // seq_len) + 1))


def merge_adjacent(ranges: ShardRanges, row_index: IntArray | None = None) -> ShardRanges:
    """Merge consecutive ranges that are adjacent in a shard and belong to the same row."""
    is_start = np.ones(len(ranges), bool)
    is_gap = ranges.first_token[1:] != ranges.first_token[:-1] + ranges.tokens[:-1]
    is_start[1:] = (ranges.shard_index[1:] != ranges.shard_index[:-1]) | is_gap
    if row_index is not None:
        is_start[1:] |= row_index[1:] != row_index[:-1]
    starts = np.flatnonzero(is_start)
    tokens = np.add.reduceat(ranges.tokens, starts) if len(starts) else ranges.tokens
    return ShardRanges(ranges.position[starts], ranges.shard_index[starts], ranges.first_token[starts], tokens)


def row_contents(source: str, ranges: ShardRanges, row_starts: IntArray) -> list[bytes]:
    """Return the bytes of each row that the ranges digest hashes after the row's index."""
    name = source.encode() + b"\0"
    fields = np.stack([ranges.shard_index, ranges.first_token, ranges.tokens], axis=1).astype("<i8").tobytes()
    return [name + fields[24 * begin : 24 * end] for begin, end in pairwise(row_starts.tolist())]


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash integers. Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014; arithmetic modulo 2^64."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
