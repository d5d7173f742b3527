"""The tokens of a source that were read, as intervals of its shards, to find tokens that were read twice.

Adjacent intervals are merged. Blocks are shuffled within windows, so the number of open intervals depends on the window and not
on the length of the run. A complete epoch is one interval.
"""

from __future__ import annotations

import numpy as np

from tandem.trainer.tools.audit.reading_order import IntArray, ReadingOrder, ShardRanges, concatenate_ranges

MAX_PENDING_RANGES = 1 << 16
"""Ranges collected before they are merged into the intervals."""


class Coverage:
    """The tokens of one source that were read in each epoch."""

    def __init__(self, reading_order: ReadingOrder):
        self._reading_order = reading_order
        self._shard_starts = np.cumsum(reading_order.shard_tokens) - reading_order.shard_tokens
        self._pending: list[ShardRanges] = []
        self._num_pending_ranges = 0
        self._intervals: dict[int, tuple[IntArray, IntArray]] = {}
        """Epoch -> starts and ends of disjoint, sorted intervals, in tokens counted through the shards in manifest order."""

    def add(self, ranges: ShardRanges) -> ShardRanges:
        """Add ranges that were read. Return ranges found to be read twice, now or in a later call; their positions are those of
        epochs.
        """
        self._pending.append(ranges)
        self._num_pending_ranges += len(ranges)
        if self._num_pending_ranges > MAX_PENDING_RANGES:
            return self.flush()
        return ranges.select(np.zeros(len(ranges), bool))

    def flush(self) -> ShardRanges:
        """Merge all pending ranges. Return the ranges that were read twice."""
        joined = concatenate_ranges(self._pending)
        epoch = joined.position // self._reading_order.epoch_tokens
        repeated = [self._merge(int(each), joined.select(epoch == each)) for each in np.unique(epoch)]
        self._pending, self._num_pending_ranges = [], 0
        return concatenate_ranges(repeated)

    @property
    def tokens(self) -> int:
        """Merged tokens, each counted once."""
        return sum(int((ends - starts).sum()) for starts, ends in self._intervals.values())

    @property
    def num_intervals(self) -> int:
        return sum(len(starts) for starts, _ in self._intervals.values())

    def _merge(self, epoch: int, ranges: ShardRanges) -> ShardRanges:
        starts = self._shard_starts[ranges.shard_index] + ranges.first_token
        old_starts, old_ends = self._intervals.get(epoch, (starts[:0], starts[:0]))
        starts, ends = np.concatenate([old_starts, starts]), np.concatenate([old_ends, starts + ranges.tokens])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        max_ends = np.maximum.accumulate(ends)
        overlaps = np.flatnonzero(starts[1:] < max_ends[:-1]) + 1
        overlap_ends = np.minimum(ends[overlaps], max_ends[overlaps - 1])
        repeated = self._to_shard_ranges(epoch, starts[overlaps], overlap_ends)
        firsts = np.flatnonzero(np.concatenate([[True], starts[1:] > max_ends[:-1]])) if len(starts) else starts
        self._intervals[epoch] = (starts[firsts], np.maximum.reduceat(ends, firsts) if len(firsts) else ends)
        return repeated

    def _to_shard_ranges(self, epoch: int, starts: IntArray, ends: IntArray) -> ShardRanges:
        shard = np.searchsorted(self._shard_starts, starts, "right") - 1
        position = np.full(len(starts), epoch * self._reading_order.epoch_tokens)
        return ShardRanges(position, shard, starts - self._shard_starts[shard], ends - starts)
