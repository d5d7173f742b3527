"""Write shards.

A shard is a tar that `webdataset.WebDataset` reads: one member per sample, which contains little-endian tokens. Headers
carry no time, user or group, so equal tokens give equal bytes. A shard ends at the end of a document, so that shards can be
read in any order without cutting one. The standard library writes them, because importing webdataset imports torch: a
second and 200 MB in every worker.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from xxhash import xxh3_128

from tandem.trainer.data.manifest import CorpusSplit, Shard
from tandem.trainer.disk import atomic_file


class _HashingFile:
    """Writes to a file and hashes what is written."""

    def __init__(self, file: BinaryIO):
        self._file, self.hashes, self.size_bytes = file, (hashlib.sha256(), xxh3_128()), 0

    def write(self, data: bytes | memoryview) -> None:
        for one in self.hashes:
            one.update(data)
        self.size_bytes += memoryview(data).nbytes
        self._file.write(data)

    def pad(self, block_bytes: int) -> None:
        """Write zeros up to a multiple of a block."""
        self.write(bytes(-self.size_bytes % block_bytes))


def write_shard(folder: Path, file_stem: str, tokens: np.ndarray, num_documents: int, sample_tokens: int) -> Shard:
    """Write a shard of these tokens, which are whole documents."""
    extension = f"u{tokens.itemsize * 8}"
    path = folder / f"{file_stem}.tar"
    with atomic_file(path) as file:
        hashed = _HashingFile(file)
        for sample_index, first in enumerate(range(0, len(tokens), sample_tokens)):
            sample = tokens[first : first + sample_tokens].astype(tokens.dtype.newbyteorder("<"), copy=False)
            member = tarfile.TarInfo(f"{file_stem}-{sample_index:06d}.{extension}")
            member.size, member.mode = sample.nbytes, 0o444
            hashed.write(member.tobuf(tarfile.USTAR_FORMAT))
            hashed.write(sample.data)
            hashed.pad(tarfile.BLOCKSIZE)
        hashed.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        hashed.pad(tarfile.RECORDSIZE)
    hashes = (one.hexdigest() for one in hashed.hashes)
    return Shard(path.name, hashed.size_bytes, len(tokens), num_documents, *hashes)


def write_split(
    folder: Path, split: str, documents: Iterable[np.ndarray], *, sample_tokens: int, shard_tokens: int
) -> CorpusSplit:
    """Write documents in their order, in shards of at least `shard_tokens` except the last."""
    shards: list[Shard] = []
    pending: list[np.ndarray] = []
    pending_tokens = 0

    def close_shard() -> None:
        stem = f"{split}-{len(shards):06d}"
        shards.append(write_shard(folder, stem, np.concatenate(pending), len(pending), sample_tokens))
        pending.clear()

    for document in documents:
        pending.append(document)
        pending_tokens += len(document)
        if pending_tokens >= shard_tokens:
            close_shard()
            pending_tokens = 0
    if pending:
        close_shard()
    return CorpusSplit(sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), shards)
