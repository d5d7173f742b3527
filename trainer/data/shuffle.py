"""The order in which a source's stream is read: blocks of neighbouring tokens, shuffled within windows.

Rows cut one after the other from long documents would fill whole batches with one document. So each epoch of the stream is cut
into blocks, runs of blocks form windows, and the blocks of a window are read in an order drawn from the seed. The order is a
bijection of positions: nothing is lost or repeated, whatever rows are cut from it. A window bounds how far apart neighbours
can be, so that a step still reads from few shards. Nothing here touches a file.

    stream    | block 0 | block 1 | block 2 | block 3 | tail      (one epoch; the tail is shorter than a block)
    order     | block 2 | block 0 | block 1 | block 3 | tail
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


class Order:
    """Positions in reading order to positions in the stream; `seed` None or block_tokens 0 reads the stream as it is."""

    def __init__(self, epoch_tokens: int, *, block_tokens: int, window_tokens: int, name: str, seed: int | None):
        self._epoch_tokens, self._block_tokens = epoch_tokens, block_tokens
        self._name, self._seed = name, seed
        self._shuffled = seed is not None and block_tokens > 0
        if self._shuffled:
            self._blocks = epoch_tokens // block_tokens
            self._window_blocks = max(1, window_tokens // block_tokens)
            self._window = lru_cache(maxsize=4)(self._window_order)

    def runs(self, position: int, count: int) -> list[tuple[int, int]]:
        """The runs of the stream, as (position, tokens), that tokens [position, position + count) of the order are."""
        if not self._shuffled:
            return [(position, count)]
        # Locals, for this is done for each block of a batch.
        epoch_tokens, block_tokens, window_blocks = self._epoch_tokens, self._block_tokens, self._window_blocks
        found: list[tuple[int, int]] = []
        end = -1
        while count > 0:
            epoch, offset = divmod(position, epoch_tokens)
            block, inside = divmod(offset, block_tokens)
            taken = min(count, block_tokens - inside, epoch_tokens - offset)
            if block < self._blocks:
                window, place = divmod(block, window_blocks)
                block = window * window_blocks + int(self._window(epoch, window)[place])
            start = epoch * epoch_tokens + block * block_tokens + inside
            if start == end:
                found[-1] = (found[-1][0], found[-1][1] + taken)
            else:
                found.append((start, taken))
            position, count, end = position + taken, count - taken, start + taken
        return found

    def window(self, position: int) -> tuple[int, int]:
        """The window around the position, as (first position, tokens): before and in it, reading order and stream hold the
        same positions.
        """
        if not self._shuffled:
            return position, 0
        tokens = self._window_blocks * self._block_tokens
        offset = position % self._epoch_tokens
        return position - offset % tokens, min(tokens, self._epoch_tokens - offset // tokens * tokens)

    def _window_order(self, epoch: int, window: int) -> np.ndarray:
        first = window * self._window_blocks
        size = min(self._window_blocks, self._blocks - first)
        digest = hashlib.sha256(f"{self._seed}/{self._name}/{epoch}/blocks/{window}".encode()).digest()
        keys = _mixed(np.arange(size, dtype=np.uint64) + np.frombuffer(digest[:8], "<u8"))
        return np.argsort(keys, kind="stable")


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that looks random; sorting by it shuffles, the same in every version of numpy.

    Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014.
    """
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
