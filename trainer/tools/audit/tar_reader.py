"""The bytes that rows are made of, read again by a reader of its own: Python's tarfile, a shard at a time."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import pairwise

from tandem.trainer.data.manifest import CorpusManifest, DamagedShard
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.tools.audit.reading_order import IntArray, ShardRanges

NUM_CACHED_SHARDS = 4
"""Shards held in memory; a window of blocks seldom reaches into more."""


class TarReader:
    """Bytes of the training split of several sources.

    Raises: DamagedShard for a shard that is not the manifest's any more, but for `skipped_shards`, sources and files: a run
    leaves a shard out because it is damaged, and may have read it before.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        manifests: Mapping[str, CorpusManifest],
        cache: ShardCache,
        skipped_shards: Collection[tuple[str, str]] = (),
    ):
        self._folders, self._manifests, self._cache, self._skipped_shards = folders, manifests, cache, skipped_shards
        self._shards: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._unreadable_shards: set[tuple[str, int]] = set()
        self.unreadable_tokens: dict[tuple[str, str], int] = {}
        """Source and file of a shard left out that cannot be read again -> its tokens that were asked for."""

    def __call__(self, source: str, ranges: ShardRanges, row_starts: IntArray) -> list[bytes | None]:
        """The tokens of each row, as they are stored; None where some cannot be read again."""
        size = self._manifests[source].token_bytes
        byte_ranges = zip(
            ranges.shard_index.tolist(),
            (ranges.first_token * size).tolist(),
            (ranges.tokens * size).tolist(),
            strict=True,
        )
        read = [self._read_range(source, *each) for each in byte_ranges]
        for shard in {index for index in ranges.shard_index.tolist() if (source, index) in self._unreadable_shards}:
            key, tokens = (
                (source, self._shard_file(source, shard)),
                int(ranges.tokens[ranges.shard_index == shard].sum()),
            )
            self.unreadable_tokens[key] = self.unreadable_tokens.get(key, 0) + tokens
        rows = (read[begin:end] for begin, end in pairwise(row_starts.tolist()))
        return [None if None in row else b"".join(row) for row in rows]  # type: ignore[arg-type]

    def _read_range(self, source: str, shard: int, first: int, count: int) -> bytes | None:
        if (source, shard) in self._unreadable_shards:
            return None
        try:
            return self._shard_bytes(source, shard)[first : first + count]
        except DamagedShard:
            if (source, self._shard_file(source, shard)) not in self._skipped_shards:
                raise
            self._unreadable_shards.add((source, shard))
            return None

    def _shard_file(self, source: str, shard: int) -> str:
        return self._manifests[source].train.shards[shard].file

    def _shard_bytes(self, source: str, index: int) -> bytes:
        key = source, index
        if key not in self._shards:
            shard = self._manifests[source].train.shards[index]
            with self._cache.open_shard(self._folders[source], shard) as file, tarfile.open(fileobj=file) as tar:
                self._shards[key] = b"".join(tar.extractfile(member).read() for member in tar)  # type: ignore[union-attr]
            if len(self._shards) > NUM_CACHED_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]
