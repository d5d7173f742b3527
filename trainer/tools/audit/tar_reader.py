"""The bytes that rows are made of, read again by a reader of its own: Python's tarfile, a shard at a time."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import pairwise

from tandem.trainer.data.manifest import DamagedShard, Manifest
from tandem.trainer.data.shard_cache import Cache
from tandem.trainer.tools.audit.reading_order import Ints, Pieces

OPEN_SHARDS = 4
"""Shards held in memory; a window of blocks seldom reaches into more."""


class TarReader:
    """Bytes of the training split of several sources.

    Raises: DamagedShard for a shard that is not the manifest's any more, but for the `left_out` ones, sources and files: a run
    leaves a shard out because it is damaged, and may have read it before.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        manifests: Mapping[str, Manifest],
        cache: Cache,
        left_out: Collection[tuple[str, str]] = (),
    ):
        self._folders, self._manifests, self._cache, self._left_out = folders, manifests, cache, left_out
        self._shards: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._gone: set[tuple[str, int]] = set()
        self.gone_tokens: dict[tuple[str, str], int] = {}
        """Source and file of a shard left out that cannot be read again -> its tokens that were asked for."""

    def __call__(self, source: str, pieces: Pieces, starts: Ints) -> list[bytes | None]:
        """The tokens of each row, as they are stored; None where some cannot be read again."""
        size = self._manifests[source].token_bytes
        ranges = zip(
            pieces.shard.tolist(), (pieces.first * size).tolist(), (pieces.tokens * size).tolist(), strict=True
        )
        read = [self._part(source, *each) for each in ranges]
        for shard in {index for index in pieces.shard.tolist() if (source, index) in self._gone}:
            key, tokens = (source, self._file(source, shard)), int(pieces.tokens[pieces.shard == shard].sum())
            self.gone_tokens[key] = self.gone_tokens.get(key, 0) + tokens
        rows = (read[begin:end] for begin, end in pairwise(starts.tolist()))
        return [None if None in row else b"".join(row) for row in rows]  # type: ignore[arg-type]

    def _part(self, source: str, shard: int, first: int, count: int) -> bytes | None:
        if (source, shard) in self._gone:
            return None
        try:
            return self._shard(source, shard)[first : first + count]
        except DamagedShard:
            if (source, self._file(source, shard)) not in self._left_out:
                raise
            self._gone.add((source, shard))
            return None

    def _file(self, source: str, shard: int) -> str:
        return self._manifests[source].train.shards[shard].file

    def _shard(self, source: str, index: int) -> bytes:
        key = source, index
        if key not in self._shards:
            shard = self._manifests[source].train.shards[index]
            with self._cache.opened(self._folders[source], shard) as file, tarfile.open(fileobj=file) as tar:
                self._shards[key] = b"".join(tar.extractfile(member).read() for member in tar)  # type: ignore[union-attr]
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(key)
        return self._shards[key]
