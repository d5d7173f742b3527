"""Spills: the intermediate files from which the shards of the global shuffle are gathered.

A spill holds documents of one unit in two files: their concatenated ids, and an index with one entry per document. Training
documents come first, then held-out ones, each sorted by *shuffle key*, a random 64-bit number of the document. A shard is a
range of keys, so it is one contiguous piece of every spill and costs one read per spill, however many documents there are.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tandem.trainer.config.outside import read_json
from tandem.trainer.disk import atomic_file

ENTRY_DTYPE = np.dtype(
    [("shuffle_key", "<u8"), ("end", "<u8"), ("document", "<u4"), ("group", "<u2"), ("held_out", "?")], align=True
)
"""A document's shuffle key, the end of its ids in the spill, its index in reading order, and the index of its group in the
unit's record. Fields are aligned, because otherwise a search in one field first copies that field of every document.
"""
MAX_GROUPS = 1 << 16
"""Limit of groups in a unit: the range of the field `group`."""
SPLITS = ("train", "validation")


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

    def write(self, tokens: list[np.ndarray], lengths: np.ndarray, entries: np.ndarray) -> None:
        """Write both files. `tokens` are batches of documents in reading order. `entries` are complete except for `end`."""
        order = np.lexsort((entries["shuffle_key"], entries["held_out"]))
        flat_ends = np.cumsum(lengths)
        batch_ends = np.cumsum([len(batch) for batch in tokens])
        batches = np.searchsorted(batch_ends, flat_ends)
        inner_ends = flat_ends - np.concatenate([[0], batch_ends])[batches]
        with atomic_file(self.tokens_path) as file:
            for document in order:
                end = inner_ends[document]
                file.write(tokens[batches[document]][end - lengths[document] : end].data)
        entries = entries[order]
        entries["end"] = np.cumsum(lengths[order])
        with atomic_file(self.index_path) as file:
            np.save(file, entries)

    def select_entries(self, split: str, first_key: int, last_key: int) -> tuple[np.ndarray, int]:
        """Return the split's entries with keys from `first_key` to `last_key`, and the start of their ids in the spill."""
        all_entries = np.load(self.index_path, mmap_mode="r")
        num_training = int(np.searchsorted(all_entries["held_out"], True))
        low, high = (0, num_training) if split == "train" else (num_training, len(all_entries))
        shuffle_keys = all_entries["shuffle_key"][low:high]
        start = low + int(np.searchsorted(shuffle_keys, np.uint64(first_key), "left"))
        stop = low + int(np.searchsorted(shuffle_keys, np.uint64(last_key), "right"))
        # Copy them, because a memory map keeps its file open, and there may be more spills than a process may open files.
        return np.array(all_entries[start:stop]), int(all_entries["end"][start - 1]) if start else 0

    def read_tokens(self, start: int, num_tokens: int, dtype: str) -> np.ndarray:
        tokens = np.fromfile(self.tokens_path, dtype, num_tokens, offset=start * np.dtype(dtype).itemsize)
        if len(tokens) != num_tokens:
            raise OSError(f"{self.tokens_path} is shorter than its index states")
        return tokens


def document_lengths(entries: np.ndarray, start: int) -> np.ndarray:
    """Return the lengths of adjacent documents, the first of which begins at `start`."""
    return np.diff(entries["end"].astype(np.int64), prepend=start)


def record_path(work_folder: Path, unit_name: str) -> Path:
    """Return the path of the file that marks a unit as finished."""
    return work_folder / f"{unit_name}.json"


@lru_cache(maxsize=1 << 16)
def group_names(work_folder: Path, unit_name: str) -> list[str]:
    names: list[str] = load_record(work_folder, unit_name)["groups"]
    return names


def load_record(work_folder: Path, unit_name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(record_path(work_folder, unit_name))
    return found


def unit_spills(work_folder: Path, unit_name: str) -> list[Spill]:
    return [Spill(work_folder, unit_name, number) for number in range(load_record(work_folder, unit_name)["spills"])]
