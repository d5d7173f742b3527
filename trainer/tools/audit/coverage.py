"""Which tokens of a source have been taken, as intervals of its shards, so that a second time is noticed.

An interval is kept only while the ones beside it are missing: blocks are shuffled within windows, so what lies open is a
window's worth, however long the run. A finished epoch is one interval.
"""

from __future__ import annotations

import numpy as np

from tandem.trainer.tools.audit.reading_order import Expansion, Ints, Pieces, end_to_end

PENDING_PIECES = 1 << 16
"""Pieces gathered before they are sorted in."""


class Coverage:
    """What has been taken of one source, epoch by epoch."""

    def __init__(self, expansion: Expansion):
        self._expansion = expansion
        self._origin = np.cumsum(expansion.shard_tokens) - expansion.shard_tokens
        self._pending: list[Pieces] = []
        self._num_pending = 0
        self._taken: dict[int, tuple[Ints, Ints]] = {}
        """Epoch -> begins and ends of intervals, sorted, apart; tokens counted through the shards in the manifest's order."""

    def add(self, pieces: Pieces) -> Pieces:
        """The pieces are taken; returns those found to be taken twice, now or by a later call, positions those of epochs."""
        self._pending.append(pieces)
        self._num_pending += len(pieces)
        return self.sorted_in() if self._num_pending > PENDING_PIECES else pieces.where(np.zeros(len(pieces), bool))

    def sorted_in(self) -> Pieces:
        """All that was added is sorted in; returns what was taken twice."""
        joined = end_to_end(self._pending)
        epoch = joined.position // self._expansion.epoch_tokens
        twice = [self._sort_in(int(each), joined.where(epoch == each)) for each in np.unique(epoch)]
        self._pending, self._num_pending = [], 0
        return end_to_end(twice)

    @property
    def tokens(self) -> int:
        """Tokens taken, each counted once, of those sorted in."""
        return sum(int((ends - begins).sum()) for begins, ends in self._taken.values())

    @property
    def num_intervals(self) -> int:
        return sum(len(begins) for begins, _ in self._taken.values())

    def _sort_in(self, epoch: int, pieces: Pieces) -> Pieces:
        begins = self._origin[pieces.shard] + pieces.first
        old_begins, old_ends = self._taken.get(epoch, (begins[:0], begins[:0]))
        begins, ends = np.concatenate([old_begins, begins]), np.concatenate([old_ends, begins + pieces.tokens])
        order = np.argsort(begins, kind="stable")
        begins, ends = begins[order], ends[order]
        reach = np.maximum.accumulate(ends)
        twice = np.flatnonzero(begins[1:] < reach[:-1]) + 1
        repeated = self._pieces(epoch, begins[twice], np.minimum(ends[twice], reach[twice - 1]))
        starts = np.flatnonzero(np.concatenate([[True], begins[1:] > reach[:-1]])) if len(begins) else begins
        self._taken[epoch] = (begins[starts], np.maximum.reduceat(ends, starts) if len(starts) else ends)
        return repeated

    def _pieces(self, epoch: int, begins: Ints, ends: Ints) -> Pieces:
        shard = np.searchsorted(self._origin, begins, "right") - 1
        return Pieces(
            np.full(len(begins), epoch * self._expansion.epoch_tokens),
            shard,
            begins - self._origin[shard],
            ends - begins,
        )
