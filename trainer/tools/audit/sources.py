"""The sources of a run: their reading orders, and the shards that are skipped at the step that is replayed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import numpy as np

from tandem.trainer.tools.audit.reading_order import IntArray, ReadingOrder, ShardRanges, cut_rows

MAX_SHOWN_TOKENS = 1 << 24


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
        end = min(end, start + MAX_SHOWN_TOKENS)  # a damaged ledger must not fill the memory
        return reading_order.shard_range_names(reading_order.shard_ranges(start, end))

    def step_range_names(self, read_ranges: Mapping[str, tuple[int, int]]) -> list[str]:
        """Name the first few ranges of each source that a step read."""
        return [name for source, ends in read_ranges.items() for name in self.shard_range_names(source, *ends)]

    def cut_rows(self, source: str, start: int, end: int, seq_len: int) -> tuple[ShardRanges, IntArray]:
        """Cut the ranges that the run reads at positions [start, end) into rows, see `reading_order.cut_rows`."""
        return cut_rows(self.shard_ranges(source, start, end)[0], seq_len)

    def max_span_tokens(self, source: str, tokens: int) -> int:
        """Return an upper bound for the positions that a run advances while it reads `tokens` tokens."""
        reading_order, skipped_shards = self.reading_orders[source], list(self.skipped_shards.get(source, ()))
        skipped_tokens = int(reading_order.shard_tokens[skipped_shards].sum())
        return tokens + skipped_tokens * (tokens // max(reading_order.epoch_tokens - skipped_tokens, 1) + 2)


def row_contents(source: str, ranges: ShardRanges, row_starts: IntArray) -> list[bytes]:
    """Return the bytes of each row that the ranges digest hashes after the row's index."""
    name = source.encode() + b"\0"
    fields = np.stack([ranges.shard_index, ranges.first_token, ranges.tokens], axis=1).astype("<i8").tobytes()
    return [name + fields[24 * begin : 24 * end] for begin, end in pairwise(row_starts.tolist())]
