"""The global shuffle: sort documents by shuffle key and cut them into shards, each gathered from all spills.

A shard is a range of keys, so any process can write it independently of other shards. Tokens are counted in bins of keys, and
a shard ends with the bin in which it reaches its target size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Annotated

import numpy as np

from tandem.data_prep import spill, work_files
from tandem.data_prep.shard_writer import write_shard
from tandem.data_prep.spill import SPLITS, Spill, Split
from tandem.data_prep.work_files import DamagedWork
from tandem.trainer.config.constraints import COUNT, POSITIVE, Pattern
from tandem.trainer.data.manifest import Shard
from tandem.trainer.disk import atomic_file

BINS_PER_SHARD = 256
"""A shard exceeds its target size by at most one bin."""
MIN_NUM_BINS, MAX_NUM_BINS = 1 << 12, 1 << 24
ENTROPY_DECIMALS = 6
"""Precision of the entropy in the manifest."""
LoadDropMask = Callable[[Spill], np.ndarray | None]
"""`stages.Preparation.load_drop_mask`."""
COUNT_CHUNK_TOKENS = 1 << 20
"""Ids that are counted at once, because numpy converts them to 64 bits."""


SHUFFLE_KEY = Pattern("[0-9a-f]{16}", "a shuffle key in hexadecimal")


@dataclass(frozen=True)
class ShardKeyRange:
    """The documents of one shard: those of the split with shuffle keys from `first_key` to `last_key`."""

    split: Split
    shard_index: Annotated[int, COUNT]
    first_key: Annotated[str, SHUFFLE_KEY]
    last_key: Annotated[str, SHUFFLE_KEY]
    documents: Annotated[int, POSITIVE]
    tokens: Annotated[int, POSITIVE]

    @property
    def file_stem(self) -> str:
        return f"{self.split}-{self.shard_index:06d}"


@dataclass(frozen=True)
class ShardKeyRanges:
    """The record of all shards."""

    ranges: list[ShardKeyRange]


@dataclass(frozen=True)
class GroupCounts:
    documents: Annotated[int, POSITIVE]
    tokens: Annotated[int, POSITIVE]


@dataclass(frozen=True)
class ShardRecord:
    """States that a shard is finished."""

    shard: Shard
    groups: dict[str, GroupCounts]
    token_counts_hash: Annotated[str, work_files.XXH3_128]


def plan_shard_key_ranges(spills: list[Spill], load_drop_mask: LoadDropMask, shard_tokens: int) -> list[ShardKeyRange]:
    """Return the ranges of all shards. Each contains at least one document.

    Note: the result depends on the documents and `shard_tokens`, not on the distribution of documents over spills.
    """
    found: list[ShardKeyRange] = []
    for split in SPLITS:
        total = sum(int(lengths.sum()) for _, lengths in _kept_keys_and_lengths(spills, split, load_drop_mask))
        bins = min(max(MIN_NUM_BINS, BINS_PER_SHARD * (total // shard_tokens + 1)), MAX_NUM_BINS)
        shift = np.uint64(64 - (bins - 1).bit_length())
        bin_tokens, bin_documents = (np.zeros(1 << (64 - int(shift)), np.int64) for _ in range(2))
        for keys, lengths in _kept_keys_and_lengths(spills, split, load_drop_mask):
            keys_of_bins = (keys >> shift).astype(np.int64)
            np.add.at(bin_tokens, keys_of_bins, lengths)
            np.add.at(bin_documents, keys_of_bins, 1)
        found += _cut_ranges(split, bin_tokens, bin_documents, int(shift), shard_tokens)
    return found


def _kept_keys_and_lengths(
    spills: list[Spill], split: str, load_drop_mask: LoadDropMask
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield shuffle keys and lengths of the kept documents of each spill."""
    for source_spill in spills:
        entries, start = source_spill.select_entries(split, 0, 2**64 - 1)
        keep = _keep_mask(source_spill, entries, load_drop_mask)
        yield entries["shuffle_key"][keep], spill.document_lengths(entries, start)[keep]


def _keep_mask(source_spill: Spill, entries: np.ndarray, load_drop_mask: LoadDropMask) -> np.ndarray | slice:
    mask = load_drop_mask(source_spill)
    return slice(None) if mask is None else ~mask[entries["document"]]


def _cut_ranges(
    split: Split, bin_tokens: np.ndarray, bin_documents: np.ndarray, shift: int, shard_tokens: int
) -> Iterator[ShardKeyRange]:
    shard_index, first_key, range_tokens, range_documents = 0, 0, 0, 0
    last_filled = int(np.flatnonzero(bin_tokens)[-1]) if bin_tokens.any() else -1
    for bin_index in np.flatnonzero(bin_tokens).tolist():
        range_tokens += int(bin_tokens[bin_index])
        range_documents += int(bin_documents[bin_index])
        if range_tokens >= shard_tokens or bin_index == last_filled:
            end = ((bin_index + 1) << shift) - 1
            yield ShardKeyRange(split, shard_index, f"{first_key:016x}", f"{end:016x}", range_documents, range_tokens)
            shard_index, first_key, range_tokens, range_documents = shard_index + 1, end + 1, 0, 0


def shard_record_path(work_folder: Path, file_stem: str) -> Path:
    """Return the path of a shard's record, which marks it as finished."""
    return work_folder / f"{file_stem}.json"


def token_counts_path(work_folder: Path, file_stem: str) -> Path:
    """Return the path of the counts of each id in a shard."""
    return work_folder / f"{file_stem}.occurrences.npy"


def gather_shard(
    output: Path, work_folder: Path, spills: list[Spill], load_drop_mask: LoadDropMask, shard_range: ShardKeyRange, *,
    dtype: str, vocab_size: int, sample_tokens: int,
) -> None:  # fmt: skip
    """Write the shard to `output`, its record and its counts of ids to `work_folder`.

    Raises: DamagedWork if the spills do not have the documents that were there when the ranges were planned.
    """
    documents: list[np.ndarray] = []
    shuffle_keys: list[np.ndarray] = []
    groups: dict[str, GroupCounts] = {}
    keys = int(shard_range.first_key, 16), int(shard_range.last_key, 16)
    for one in spills:
        entries, start = one.select_entries(shard_range.split, *keys)
        if not len(entries):
            continue
        found = one.read_documents(entries, start, dtype)
        keep, lengths = _keep_mask(one, entries, load_drop_mask), spill.document_lengths(entries, start)
        shuffle_keys.append(entries["shuffle_key"][keep])
        documents += found if isinstance(keep, slice) else compress(found, keep)
        _count_groups(groups, spill.group_names(one.work_folder, one.unit_name), entries["group"][keep], lengths[keep])
    counted = len(documents), sum(map(len, documents))
    if counted != (shard_range.documents, shard_range.tokens):
        raise DamagedWork(
            f"{work_folder.parent}: has {counted[0]} documents and {counted[1]} tokens for {shard_range.file_stem}.tar, not "
            f"{shard_range.documents} and {shard_range.tokens} as planned; remove {work_folder.parent} and run the same "
            "command again"
        )
    # Equal keys keep the order of the inputs, which is the order of the spills.
    order = np.argsort(np.concatenate(shuffle_keys), kind="stable")
    tokens = np.concatenate([documents[document] for document in order])
    shard = write_shard(output, shard_range.file_stem, tokens, len(documents), sample_tokens)
    counts_path = token_counts_path(work_folder, shard_range.file_stem)
    with atomic_file(counts_path) as file:
        np.save(file, count_tokens(tokens, vocab_size))
    record = ShardRecord(shard, groups, work_files.file_hash(counts_path))
    work_files.write_record(shard_record_path(work_folder, shard_range.file_stem), record)


def _count_groups(counts: dict[str, GroupCounts], names: list[str], groups: np.ndarray, lengths: np.ndarray) -> None:
    for group in np.unique(groups):
        is_in_group, name = groups == group, names[group]
        documents, tokens = int(is_in_group.sum()), int(lengths[is_in_group].sum())
        if earlier := counts.get(name):
            documents, tokens = documents + earlier.documents, tokens + earlier.tokens
        counts[name] = GroupCounts(documents, tokens)


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count the occurrences of each id."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(tokens), COUNT_CHUNK_TOKENS):
        counts += np.bincount(tokens[first : first + COUNT_CHUNK_TOKENS], minlength=vocab_size)
    return counts


def entropy_nats(token_counts: np.ndarray) -> float:
    """Return the entropy of ids with these counts."""
    shares = token_counts[token_counts > 0] / token_counts.sum()
    return float(-(shares * np.log(shares)).sum())


def load_shard_record(work_folder: Path, file_stem: str) -> ShardRecord:
    """Load the record of a finished shard.  Raises: DamagedWork."""
    return work_files.read_record(shard_record_path(work_folder, file_stem), ShardRecord)


def load_token_counts(output: Path, work_folder: Path, record: ShardRecord) -> np.ndarray:
    """Return the counts of ids of a finished shard.  Raises: DamagedWork if they or the size of the shard have changed."""
    file_stem = record.shard.file.removesuffix(".tar")
    counts_path = token_counts_path(work_folder, file_stem)
    remedy = f"remove {shard_record_path(work_folder, file_stem)} and run the same command again"
    work_files.check_file(output / record.shard.file, remedy, size_bytes=record.shard.bytes)
    work_files.check_file(counts_path, remedy, xxh3_hash=record.token_counts_hash)
    token_counts: np.ndarray = np.load(counts_path)
    return token_counts
