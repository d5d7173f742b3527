"""Spills: the unfinished work of a preparation, from which the shards of the global shuffle are gathered.

A spill holds documents of one unit as two files: their ids one after the other, and an index of one entry a document.
Documents lie in the order of their *rank*, a random 64-bit number that belongs to each document, the training documents
before the held-out ones. So a shard, which is a range of ranks, is one contiguous piece of every spill: as many reads as
there are spills, whatever the number of documents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.write import whole_file

ENTRY = np.dtype([("rank", "<u8"), ("end", "<u8"), ("document", "<u4"), ("group", "<u2"), ("held_out", "?")])
"""Of a document: its rank, where its ids end in the spill, its number in the unit, its group in the unit's record."""
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Spill:
    """One of them, by the folder of unfinished work, its unit and its number there."""

    work: Path
    unit: str
    number: int

    @property
    def tokens_path(self) -> Path:
        return self.work / f"{self.unit}-{self.number:03d}.tokens"

    @property
    def index_path(self) -> Path:
        return self.work / f"{self.unit}-{self.number:03d}.npy"

    def write(self, tokens: list[np.ndarray], lengths: np.ndarray, entries: np.ndarray) -> None:
        """Both files are on disk. `tokens` are the documents in the order read, `entries` theirs but for `end`."""
        order = np.lexsort((entries["rank"], entries["held_out"]))
        flat_ends = np.cumsum(lengths)
        batch_ends = np.cumsum([len(batch) for batch in tokens])
        batches = np.searchsorted(batch_ends, flat_ends)
        inner_ends = flat_ends - np.concatenate([[0], batch_ends])[batches]
        with whole_file(self.tokens_path) as file:
            for document in order:
                end = inner_ends[document]
                file.write(tokens[batches[document]][end - lengths[document] : end].data)
        entries = entries[order]
        entries["end"] = np.cumsum(lengths[order])
        with whole_file(self.index_path) as file:
            np.save(file, entries)

    def between(self, split: str, first: int, last: int) -> slice:
        """Which entries of the index are documents of the split with ranks in [first, last]."""
        entries = index(self)
        border = int(np.searchsorted(entries["held_out"], True))
        start, stop = (0, border) if split == "train" else (border, len(entries))
        ranks = entries["rank"][start:stop]
        return slice(
            start + int(np.searchsorted(ranks, np.uint64(first), "left")),
            start + int(np.searchsorted(ranks, np.uint64(last), "right")),
        )

    def read(self, entries: slice, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of these documents, and where each begins and ends in them."""
        every = index(self)
        ends = every["end"][entries].astype(np.int64)
        first = int(every["end"][entries.start - 1]) if entries.start else 0
        starts = np.concatenate([[first], ends[:-1]]) if len(ends) else ends
        size = np.dtype(dtype).itemsize
        count = int(ends[-1]) - first if len(ends) else 0
        tokens = np.fromfile(self.tokens_path, dtype, count, offset=first * size)
        return tokens, starts - first, ends - first


@lru_cache(maxsize=4096)
def index(spill: Spill) -> np.ndarray:
    """The entries of a spill, mapped from its file."""
    entries: np.ndarray = np.load(spill.index_path, mmap_mode="r")
    return entries


def record_path(work: Path, unit: str) -> Path:
    """The file whose presence says that the unit is finished."""
    return work / f"{unit}.json"


def record(work: Path, unit: str) -> dict[str, Any]:
    """What a finished unit counted."""
    found: dict[str, Any] = json.loads(record_path(work, unit).read_text(encoding="utf-8"))
    return found


def spills(work: Path, unit: str) -> list[Spill]:
    """Those of a finished unit."""
    return [Spill(work, unit, number) for number in range(record(work, unit)["spills"])]
