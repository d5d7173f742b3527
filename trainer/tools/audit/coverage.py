"""Record the tokens of a source that were read, as intervals of its shards, to find tokens that were read twice.

Adjacent intervals are merged, so a complete epoch is one interval. Blocks are shuffled within windows, so the number of
intervals in an incomplete epoch depends on the window, not on the length of the run.
"""

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
        """Add ranges that were read. Return the ranges now known to have been read twice, including those of earlier calls.

        The position of a returned range is only that of its epoch.
        """
        self._pending.append(ranges)
        self._num_pending_ranges += len(ranges)
        return self.flush() if self._num_pending_ranges > MAX_PENDING_RANGES else ranges.select(slice(0))

    def flush(self) -> ShardRanges:
        """Merge all pending ranges. Return the ranges now known to have been read twice."""
        joined = concatenate_ranges(self._pending)
        epoch = joined.position // self._reading_order.epoch_tokens
        repeated = [self._merge(int(each), joined.select(epoch == each)) for each in np.unique(epoch)]
        self._pending, self._num_pending_ranges = [], 0
        return concatenate_ranges(repeated)

    @property
    def tokens(self) -> int:
        """Merged tokens, each counted once."""
        return sum(int((ends - starts).sum()) for starts, ends in self._intervals.values())

    def _merge(self, epoch: int, ranges: ShardRanges) -> ShardRanges:
        starts = self._shard_starts[ranges.shard_index] + ranges.first_token
        old_starts, old_ends = self._intervals.get(epoch, (starts[:0], starts[:0]))
        starts, ends = np.concatenate([old_starts, starts]), np.concatenate([old_ends, starts + ranges.tokens])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        max_ends = np.maximum.accumulate(ends)
        overlaps = np.flatnonzero(starts[1:] < max_ends[:-1]) + 1
        firsts = np.flatnonzero(np.concatenate([[True], starts[1:] > max_ends[:-1]])) if len(starts) else starts
        self._intervals[epoch] = (starts[firsts], np.maximum.reduceat(ends, firsts) if len(firsts) else ends)
        tokens = np.minimum(ends[overlaps], max_ends[overlaps - 1]) - starts[overlaps]
        shard = np.searchsorted(self._shard_starts, starts[overlaps], "right") - 1
        position = np.full(len(overlaps), epoch * self._reading_order.epoch_tokens)
        return ShardRanges(position, shard, starts[overlaps] - self._shard_starts[shard], tokens)
