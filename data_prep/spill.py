"""Spills: the intermediate files from which the shards of the global shuffle are gathered.

A spill holds documents of one unit in two files: their concatenated ids, and an index with one entry per document. Training
documents come first, then held-out ones, each sorted by *shuffle key*, a random 64-bit number of the document. A shard is a
range of keys, so it is one contiguous piece of every spill and costs one read per spill, however many documents there are.

The record of the unit has the sizes and hashes of these files. `check_unit_files` reads each index once, before shards are
planned. Afterwards only pieces are read, so every document has a checksum, and every shard a number of documents and tokens.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.data_prep import work_files
from tandem.data_prep.work_files import DamagedWork
from tandem.trainer.config.constraints import COUNT, POSITIVE
from tandem.trainer.disk import atomic_file

ENTRY_DTYPE = np.dtype(
    [("shuffle_key", "<u8"), ("end", "<u8"), ("checksum", "<u8"), ("document", "<u4"), ("group", "<u2"), ("held_out", "?"),
     ("unused", "u1")],
    align=True,
)  # fmt: skip
"""A document's shuffle key, the end of its ids in the spill, the XXH3-64 of its ids and of the next three fields, its index
in reading order, and the index of its group in the unit's record. Fields are aligned, because otherwise a search in one field
first copies that field of every document. With `unused` no byte is left undefined, so equal entries have equal hashes.
"""
MAX_GROUPS = 1 << 16
"""Limit of groups in a unit: the range of the field `group`."""
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
CORPUS_FOLDER_PREFIX = "whole-"
"""Begins the name of the folder of what depends on all units."""


@dataclass(frozen=True)
class SpillRecord:
    """What the files of a spill were when they were written."""

    documents: Annotated[int, POSITIVE]
    tokens_bytes: Annotated[int, POSITIVE]
    index_hash: Annotated[str, work_files.XXH3_128]
    bands_hash: Annotated[str, work_files.XXH3_128] | None
    """Of the signatures of its documents, with --deduplicate."""


@dataclass(frozen=True)
class UnitRecord:
    """States that a unit is finished."""

    spills: list[SpillRecord]
    groups: list[str]
    """The values of the field of --group-field, by their index in spills."""
    counts: dict[str, Annotated[int, COUNT]]
    part_hashes: str
    """`content_hash` of each part, one per line. A list of them would cost every worker seconds per million files."""
    bad_records: list[str] = field(default_factory=list)
    """The first bad records that were left out, each with its place and its fault."""
    other_values: dict[str, Annotated[int, COUNT]] = field(default_factory=dict)
    """The values of the field of --where in documents that were left out, if all documents were."""

    @property
    def documents(self) -> int:
        return sum(one.documents for one in self.spills)


@dataclass(frozen=True)
class Spill:
    work_folder: Path
    unit_name: str
    spill_index: int

    @property
    def tokens_path(self) -> Path:
        return self.work_folder / f"{self.unit_name}-{self.spill_index:03d}.tokens"

    @property
    def index_path(self) -> Path:
        return self.work_folder / f"{self.unit_name}-{self.spill_index:03d}.npy"

    @property
    def bands_path(self) -> Path:
        """The path of the signatures of the documents, which `duplicates` reads."""
        return self.index_path.with_suffix(".bands.npy")

    def write(
        self, tokens: list[np.ndarray], lengths: np.ndarray, entries: np.ndarray, bands_hash: str | None = None
    ) -> SpillRecord:
        """Write both files. `tokens` are batches of documents in reading order. `entries` lack `end` and `checksum`."""
        order = np.lexsort((entries["shuffle_key"], entries["held_out"]))
        flat_ends = np.cumsum(lengths)
        batch_ends = np.cumsum([len(batch) for batch in tokens])
        batches = np.searchsorted(batch_ends, flat_ends)
        inner_ends = flat_ends - np.concatenate([[0], batch_ends])[batches]
        entries = entries[order]
        entries["end"] = np.cumsum(lengths[order])
        checksums = []
        with atomic_file(self.tokens_path) as file:
            for document, seed in zip(order, _checksum_seeds(entries), strict=True):
                end = inner_ends[document]
                ids = tokens[batches[document]][end - lengths[document] : end].data
                file.write(ids)
                checksums.append(xxh3_64_intdigest(ids, seed))
            tokens_bytes = file.tell()
        entries["checksum"] = checksums
        with atomic_file(self.index_path) as file:
            np.save(file, entries)
        return SpillRecord(len(entries), tokens_bytes, work_files.file_hash(self.index_path), bands_hash)

    def check_files(self, record: SpillRecord) -> None:
        """Raises: DamagedWork if a file differs from its record. The ids are not read; only their size is compared."""
        remedy = damage_remedy(self.index_path)
        work_files.check_file(self.tokens_path, remedy, size_bytes=record.tokens_bytes)
        work_files.check_file(self.index_path, remedy, xxh3_hash=record.index_hash)
        if record.bands_hash is not None:
            work_files.check_file(self.bands_path, remedy, xxh3_hash=record.bands_hash)

    def select_entries(self, split: str, first_key: int, last_key: int) -> tuple[np.ndarray, int]:
        """Return the split's entries with keys from `first_key` to `last_key`, and the start of their ids in the spill."""
        all_entries = work_files.map_array(self.index_path, ENTRY_DTYPE, damage_remedy(self.index_path))
        num_training = int(np.searchsorted(all_entries["held_out"], True))
        low, high = (0, num_training) if split == "train" else (num_training, len(all_entries))
        shuffle_keys = all_entries["shuffle_key"][low:high]
        start = low + int(np.searchsorted(shuffle_keys, np.uint64(first_key), "left"))
        stop = low + int(np.searchsorted(shuffle_keys, np.uint64(last_key), "right"))
        # Copy them, because a memory map keeps its file open, and there may be more spills than a process may open files.
        return np.array(all_entries[start:stop]), int(all_entries["end"][start - 1]) if start else 0

    def read_documents(self, entries: np.ndarray, start: int, dtype: str) -> list[np.ndarray]:
        """Return the ids of each of these adjacent documents.  Raises: DamagedWork if they or the entries are damaged."""
        token_bytes, remedy = np.dtype(dtype).itemsize, damage_remedy(self.index_path)
        work_files.check_file(self.tokens_path, remedy)
        size = self.tokens_path.stat().st_size // token_bytes
        if entries["end"].max() > size or (document_lengths(entries, min(start, size)) <= 0).any():
            raise DamagedWork(f"{self.tokens_path}: is shorter than its index states; {remedy}")
        ends = entries["end"].astype(np.int64) - start
        documents = np.split(np.fromfile(self.tokens_path, dtype, int(ends[-1]), offset=start * token_bytes), ends[:-1])
        for ids, seed, checksum in zip(documents, _checksum_seeds(entries), entries["checksum"].tolist(), strict=True):
            if xxh3_64_intdigest(ids.data, seed) != checksum:
                raise DamagedWork(f"{self.tokens_path}: does not match the checksums of its documents; {remedy}")
        return documents


def _checksum_seeds(entries: np.ndarray) -> list[int]:
    """Return a number for each entry, which depends on every field except `end` and `checksum`."""
    others = entries["document"].astype(np.uint64) << np.uint64(32) | entries["group"].astype(np.uint64) << np.uint64(1)
    seeds: list[int] = (entries["shuffle_key"] ^ (others | entries["held_out"].astype(np.uint64))).tolist()
    return seeds


def document_lengths(entries: np.ndarray, start: int) -> np.ndarray:
    """Return the lengths of adjacent documents, the first of which begins at `start`."""
    return np.diff(entries["end"].astype(np.int64), prepend=start)


def record_path(work_folder: Path, unit_name: str) -> Path:
    """Return the path of the file that marks a unit as finished."""
    return work_folder / f"{unit_name}.json"


def damage_remedy(spill_file: Path) -> str:
    """Return what to do if a file of a spill is damaged: encode its unit again, and repeat all that used it."""
    record = record_path(spill_file.parent, spill_file.name.partition("-")[0])
    return f"remove {record} and {spill_file.parent / CORPUS_FOLDER_PREFIX}* and run the same command again"


@lru_cache(maxsize=1 << 16)
def group_names(work_folder: Path, unit_name: str) -> list[str]:
    return load_record(work_folder, unit_name).groups


def load_record(work_folder: Path, unit_name: str) -> UnitRecord:
    """Load the record of a finished unit.  Raises: DamagedWork."""
    return work_files.read_record(record_path(work_folder, unit_name), UnitRecord)


def check_unit_files(work_folder: Path, unit_name: str) -> None:
    """Raises: DamagedWork if a file of one of the unit's spills differs from the unit's record, which is read once."""
    for number, record in enumerate(load_record(work_folder, unit_name).spills):
        Spill(work_folder, unit_name, number).check_files(record)


def unit_spills(work_folder: Path, unit_name: str) -> list[Spill]:
    return [Spill(work_folder, unit_name, number) for number in range(len(load_record(work_folder, unit_name).spills))]
