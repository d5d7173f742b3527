"""Files that appear whole or not at all, and the shards written that way.

A shard is a webdataset tar that the stock `webdataset.WebDataset` reads: one member per sample, its data the
little-endian tokens. Headers carry no time, user or group, so equal tokens are equal bytes. A shard is closed
at the end of a document, so that shards can be read in any order without cutting one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter

from trainer.data.manifest import Shard, Split

TEMPORARY = ".tmp"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends without error, its content then on disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    settle(path.parent)


def settle(folder: Path) -> None:
    """The names in the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_split(
    folder: Path, split: str, documents: Iterable[np.ndarray], *, sample_tokens: int, shard_tokens: int
) -> Split:
    """The documents in shards of at least `shard_tokens` (but the last), in their order."""
    shards: list[Shard] = []
    held: list[np.ndarray] = []
    held_tokens = 0
    for document in documents:
        held.append(document)
        held_tokens += len(document)
        if held_tokens >= shard_tokens:
            shards.append(_write_shard(folder, f"{split}-{len(shards):06d}", held, sample_tokens))
            held, held_tokens = [], 0
    if held:
        shards.append(_write_shard(folder, f"{split}-{len(shards):06d}", held, sample_tokens))
    return Split(sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), shards)


def _write_shard(folder: Path, stem: str, documents: list[np.ndarray], sample_tokens: int) -> Shard:
    tokens = np.concatenate(documents)
    extension = f"u{tokens.itemsize * 8}"
    path = folder / f"{stem}.tar"
    with (
        whole_file(path) as file,
        TarWriter(file, encoder=False, user="", group="", mtime=0) as tar,
    ):
        for number, first in enumerate(range(0, len(tokens), sample_tokens)):
            sample = tokens[first : first + sample_tokens].astype(tokens.dtype.newbyteorder("<"), copy=False)
            tar.write({"__key__": f"{stem}-{number:06d}", extension: sample.tobytes()})
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, path.stat().st_size, len(tokens), len(documents), digest)
