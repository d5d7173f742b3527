"""Write shards.

A shard is a tar that `webdataset.WebDataset` reads: one member per sample, which contains little-endian tokens. Headers
contain no time, user or group, so equal tokens give equal bytes. A shard ends at the end of a document, so that shards can
be read in any order without cutting a document. The standard library writes them, because importing webdataset imports
torch, which takes a second and 200 MB in every worker.
"""

import hashlib
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from xxhash import xxh3_128

from tandem.trainer.data.manifest import Shard
from tandem.trainer.disk import atomic_file


class _HashingFile:
    """A file that hashes the bytes written to it."""

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
