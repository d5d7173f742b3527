"""The order in which a source's stream is read: blocks of neighbouring tokens, shuffled within windows.

Without a shuffle, one long document could fill a whole batch. Each epoch of the stream is therefore cut into blocks,
consecutive blocks form windows, and the blocks of a window are read in an order drawn from the seed. The order is a bijection
of positions, so no token is lost or repeated, no matter how rows are cut from it. The window bounds the distance between the
rows of a step, so that a step reads from few shards. Nothing here touches a file.

    stream    | block 0 | block 1 | block 2 | block 3 | tail      (one epoch; the tail is shorter than a block)
    order     | block 2 | block 0 | block 1 | block 3 | tail
"""

import hashlib
from functools import lru_cache

import numpy as np


class BlockShuffle:
    """Maps positions in reading order to positions in the stream. A `seed` of None or a block size of 0 keeps the order."""

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
        """Convert a range of the reading order to ranges of the stream, as (position, tokens)."""
        if not self._is_shuffled:
            return [(position, num_tokens)]
        # Local variables are faster, and the loop runs for each block of a batch.
        epoch_tokens, shuffle_block_tokens = self._epoch_tokens, self._shuffle_block_tokens
        window_blocks = self._blocks_per_window
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
        """Return the window that contains the position, as (first position, tokens).

        In a window, and in everything before it, reading order and stream contain the same tokens.
        """
        if not self._is_shuffled:
            return position, 0
        shuffle_window_tokens = self._blocks_per_window * self._shuffle_block_tokens
        offset = position % self._epoch_tokens
        offset_in_window = offset % shuffle_window_tokens
        tokens = min(shuffle_window_tokens, self._epoch_tokens - (offset - offset_in_window))
        return position - offset_in_window, tokens

    def _window_permutation(self, epoch: int, window_index: int) -> np.ndarray:
        first_block = window_index * self._blocks_per_window
        num_blocks = min(self._blocks_per_window, self._num_blocks - first_block)
        digest = hashlib.sha256(f"{self._seed}/{self._source}/{epoch}/blocks/{window_index}".encode()).digest()
        keys = _splitmix64(np.arange(num_blocks, dtype=np.uint64) + np.frombuffer(digest[:8], "<u8"))
        return np.argsort(keys, kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers bijectively. Sorting by the result is a shuffle that is the same in every version of numpy.

    Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014.
    """
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
