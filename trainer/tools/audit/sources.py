"""The sources of a run: their reading orders from the manifests' copies, less the shards that are left out at a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import numpy as np

from tandem.trainer.tools.audit.reading_order import IntArray, ReadingOrder, ShardRanges, cut_rows

MAX_SHOWN_TOKENS = 1 << 24


class Sources:
    """Reading orders by source. `skipped_shards` changes as the ledger is gone through."""

    def __init__(self, reading_orders: Mapping[str, ReadingOrder], validation_files: Mapping[str, Collection[str]]):
        self.reading_orders = reading_orders
        self._validation_files = validation_files
        self.skipped_shards: dict[str, set[int]] = {}
        """Source -> indices of shards."""

    def __contains__(self, source: str) -> bool:
        return source in self.reading_orders

    def skip_shard(self, source: str, file: str) -> bool:
        """From here on the shard is left out, of no consequence if it is a held-out one; False where there is no such shard."""
        files = self.reading_orders[source].shard_files if source in self else []
        if file not in files:
            return file in self._validation_files.get(source, ())
        self.skipped_shards.setdefault(source, set()).add(files.index(file))
        return True

    def shard_ranges(self, source: str, start: int, end: int) -> tuple[ShardRanges, ShardRanges]:
        """Places [start, end) of a source: what is read there, and what is passed over."""
        ranges = self.reading_orders[source].shard_ranges(start, end)
        is_skipped = np.isin(ranges.shard_index, list(self.skipped_shards.get(source, ())))
        return ranges.select(~is_skipped), ranges.select(is_skipped)

    def shard_range_names(self, source: str, start: int, end: int) -> list[str]:
        """The ranges at places [start, end), as FILE:FIRST+TOKENS, what is left out included; the first few."""
        # Nothing that a damaged ledger says shall fill the memory.
        return self.reading_orders[source].shard_range_names(
            self.reading_orders[source].shard_ranges(start, min(end, start + MAX_SHOWN_TOKENS))
        )

    def step_range_names(self, read_ranges: Mapping[str, tuple[int, int]]) -> list[str]:
        """Name what a step read of each source, as FILE:FIRST+TOKENS; the first few ranges of each."""
        return [name for source, ends in read_ranges.items() for name in self.shard_range_names(source, *ends)]

    def cut_rows(self, source: str, start: int, end: int, seq_len: int) -> tuple[ShardRanges, IntArray]:
        """What is read at places [start, end), cut into rows, see `reading_order.cut_rows`."""
        return cut_rows(self.shard_ranges(source, start, end)[0], seq_len)

    def max_span_tokens(self, source: str, tokens: int) -> int:
        """Places within which so many tokens can be read."""
        skipped_shards = list(self.skipped_shards.get(source, ()))
        reading_order = self.reading_orders[source]
        skipped_tokens = int(reading_order.shard_tokens[skipped_shards].sum())
        return tokens + skipped_tokens * (tokens // max(reading_order.epoch_tokens - skipped_tokens, 1) + 2)


def row_contents(source: str, ranges: ShardRanges, row_starts: IntArray) -> list[bytes]:
    """What the evidence of ranges hashes of each row, after its number."""
    name = source.encode() + b"\0"
    fields = np.stack([ranges.shard_index, ranges.first_token, ranges.tokens], axis=1).astype("<i8").tobytes()
    return [name + fields[24 * begin : 24 * end] for begin, end in pairwise(row_starts.tolist())]
