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


class BlockShuffle:
    """Positions in reading order to positions in the stream; `seed` None or 0 block tokens reads the stream as it is."""

    def __init__(
        self, epoch_tokens: int, *, shuffle_block_tokens: int, shuffle_window_tokens: int, source: str, seed: int | None
    ):
        self._epoch_tokens, self._shuffle_block_tokens = epoch_tokens, shuffle_block_tokens
        self._source, self._seed = source, seed
        self._is_shuffled = seed is not None and shuffle_block_tokens > 0
        if self._is_shuffled:
            self._num_blocks = epoch_tokens // shuffle_block_tokens
            self._blocks_per_window = max(1, shuffle_window_tokens // shuffle_block_tokens)
            self._cached_window_permutation = lru_cache(maxsize=4)(self._window_permutation)

    def stream_ranges(self, position: int, num_tokens: int) -> list[tuple[int, int]]:
        """The runs of the stream, as (position, tokens), that tokens [position, position + count) of the order are."""
        if not self._is_shuffled:
            return [(position, num_tokens)]
        # Locals, for this is done for each block of a batch.
        epoch_tokens, shuffle_block_tokens, window_blocks = (
            self._epoch_tokens,
            self._shuffle_block_tokens,
            self._blocks_per_window,
        )
        ranges: list[tuple[int, int]] = []
        end = -1
        while num_tokens > 0:
            epoch, offset = divmod(position, epoch_tokens)
            block, block_offset = divmod(offset, shuffle_block_tokens)
            length_tokens = min(num_tokens, shuffle_block_tokens - block_offset, epoch_tokens - offset)
            if block < self._num_blocks:
                window, index_in_window = divmod(block, window_blocks)
                block = window * window_blocks + int(self._cached_window_permutation(epoch, window)[index_in_window])
            start = epoch * epoch_tokens + block * shuffle_block_tokens + block_offset
            if start == end:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length_tokens)
            else:
                ranges.append((start, length_tokens))
            position, num_tokens, end = position + length_tokens, num_tokens - length_tokens, start + length_tokens
        return ranges

    def window_range(self, position: int) -> tuple[int, int]:
        """The window around the position, as (first position, tokens): before and in it, reading order and stream hold the
        same positions.
        """
        if not self._is_shuffled:
            return position, 0
        shuffle_window_tokens = self._blocks_per_window * self._shuffle_block_tokens
        offset = position % self._epoch_tokens
        return position - offset % shuffle_window_tokens, min(
            shuffle_window_tokens, self._epoch_tokens - offset // shuffle_window_tokens * shuffle_window_tokens
        )

    def _window_permutation(self, epoch: int, window_index: int) -> np.ndarray:
        first_block = window_index * self._blocks_per_window
        num_blocks = min(self._blocks_per_window, self._num_blocks - first_block)
        digest = hashlib.sha256(f"{self._seed}/{self._source}/{epoch}/blocks/{window_index}".encode()).digest()
        keys = _splitmix64(np.arange(num_blocks, dtype=np.uint64) + np.frombuffer(digest[:8], "<u8"))
        return np.argsort(keys, kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that looks random; sorting by it shuffles, the same in every version of numpy.

    Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014.
    """
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
