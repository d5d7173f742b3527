"""The bytes that rows are made of, read again by a reader of its own: Python's tarfile, a shard at a time."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise

from trainer.audit.expansion import Ints, Pieces
from trainer.data.cache import Cache
from trainer.data.manifest import Manifest

OPEN_SHARDS = 4
"""Shards held in memory; a window of blocks seldom reaches into more."""


class TarReader:
    """Bytes of the training split of several sources. Raises: DamagedShard for a shard that is not the manifest's any more."""

    def __init__(self, folders: Mapping[str, str], manifests: Mapping[str, Manifest], cache: Cache):
        self._folders, self._manifests, self._cache = folders, manifests, cache
        self._shards: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def __call__(self, source: str, pieces: Pieces, starts: Ints) -> list[bytes]:
        """The tokens of each row, as they are stored."""
        size = self._manifests[source].token_bytes
        ranges = zip(
            pieces.shard.tolist(), (pieces.first * size).tolist(), (pieces.tokens * size).tolist(), strict=True
        )
        read = [self._shard(source, shard)[first : first + count] for shard, first, count in ranges]
        return [b"".join(read[begin:end]) for begin, end in pairwise(starts.tolist())]

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
