"""Which tokens of a source have been taken, as intervals of its shards, so that a second time is noticed.

An interval is kept only while the ones beside it are missing: blocks are shuffled within windows, so what lies open is a
window's worth, however long the run. A finished epoch is one interval.
"""

from __future__ import annotations

import numpy as np

from tandem.trainer.tools.audit.reading_order import IntArray, ReadingOrder, ShardRanges, concatenate_ranges

MAX_PENDING_RANGES = 1 << 16
"""Pieces gathered before they are sorted in."""


class Coverage:
    """What has been taken of one source, epoch by epoch."""

    def __init__(self, reading_order: ReadingOrder):
        self._reading_order = reading_order
        self._shard_starts = np.cumsum(reading_order.shard_tokens) - reading_order.shard_tokens
        self._pending: list[ShardRanges] = []
        self._num_pending_ranges = 0
        self._intervals: dict[int, tuple[IntArray, IntArray]] = {}
        """Epoch -> begins and ends of intervals, sorted, apart; tokens counted through the shards in the manifest's order."""

    def add(self, ranges: ShardRanges) -> ShardRanges:
        """The pieces are taken; returns those found to be taken twice, now or by a later call, positions those of epochs."""
        self._pending.append(ranges)
        self._num_pending_ranges += len(ranges)
        return (
            self.flush()
            if self._num_pending_ranges > MAX_PENDING_RANGES
            else ranges.select(np.zeros(len(ranges), bool))
        )

    def flush(self) -> ShardRanges:
        """All that was added is sorted in; returns what was taken twice."""
        joined = concatenate_ranges(self._pending)
        epoch = joined.position // self._reading_order.epoch_tokens
        repeated = [self._merge(int(each), joined.select(epoch == each)) for each in np.unique(epoch)]
        self._pending, self._num_pending_ranges = [], 0
        return concatenate_ranges(repeated)

    @property
    def tokens(self) -> int:
        """Tokens taken, each counted once, of those sorted in."""
        return sum(int((ends - begins).sum()) for begins, ends in self._intervals.values())

    @property
    def num_intervals(self) -> int:
        return sum(len(begins) for begins, _ in self._intervals.values())

    def _merge(self, epoch: int, ranges: ShardRanges) -> ShardRanges:
        begins = self._shard_starts[ranges.shard_index] + ranges.first_token
        old_begins, old_ends = self._intervals.get(epoch, (begins[:0], begins[:0]))
        begins, ends = np.concatenate([old_begins, begins]), np.concatenate([old_ends, begins + ranges.tokens])
        order = np.argsort(begins, kind="stable")
        begins, ends = begins[order], ends[order]
        max_ends = np.maximum.accumulate(ends)
        overlap_indices = np.flatnonzero(begins[1:] < max_ends[:-1]) + 1
        repeated = self._to_shard_ranges(
            epoch, begins[overlap_indices], np.minimum(ends[overlap_indices], max_ends[overlap_indices - 1])
        )
        starts = np.flatnonzero(np.concatenate([[True], begins[1:] > max_ends[:-1]])) if len(begins) else begins
        self._intervals[epoch] = (begins[starts], np.maximum.reduceat(ends, starts) if len(starts) else ends)
        return repeated

    def _to_shard_ranges(self, epoch: int, starts: IntArray, ends: IntArray) -> ShardRanges:
        shard = np.searchsorted(self._shard_starts, starts, "right") - 1
        return ShardRanges(
            np.full(len(starts), epoch * self._reading_order.epoch_tokens),
            shard,
            starts - self._shard_starts[shard],
            ends - starts,
        )
