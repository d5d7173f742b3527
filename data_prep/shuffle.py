"""The global shuffle: sort documents by shuffle key and cut them into shards, each gathered from all spills.

A shard is a range of keys, so any process can write it independently of other shards. Tokens are counted in bins of keys, and
a shard ends with the bin in which it reaches its target size.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tandem.data_prep import spill
from tandem.data_prep.shard_writer import write_shard
from tandem.data_prep.spill import SPLITS, Spill
from tandem.trainer.config.outside import read_json
from tandem.trainer.data.manifest import Shard
from tandem.trainer.disk import atomic_file, atomic_write

BINS_PER_SHARD = 256
"""A shard exceeds its target size by at most one bin."""
MIN_NUM_BINS, MAX_NUM_BINS = 1 << 12, 1 << 24
ENTROPY_DECIMALS = 6
"""Precision of the entropy in the manifest."""
LoadDropMask = Callable[[Spill], np.ndarray | None]
"""`stages.Preparation.load_drop_mask`."""
COUNT_CHUNK_TOKENS = 1 << 20
"""Ids that are counted at once, because numpy converts them to 64 bits."""


@dataclass(frozen=True)
class ShardKeyRange:
    """The documents of one shard: those of the split with shuffle keys from `first_key` to `last_key`."""

    split: str
    shard_index: int
    first_key: int
    last_key: int

    @property
    def file_stem(self) -> str:
        return f"{self.split}-{self.shard_index:06d}"


def plan_shard_key_ranges(spills: list[Spill], load_drop_mask: LoadDropMask, shard_tokens: int) -> list[ShardKeyRange]:
    """Return the ranges of all shards. Each contains at least one document.

    Note: the result depends on the documents and `shard_tokens`, not on the distribution of documents over spills.
    """
    found: list[ShardKeyRange] = []
    for split in SPLITS:
        total = sum(int(lengths.sum()) for _, lengths in _kept_keys_and_lengths(spills, split, load_drop_mask))
        bins = min(max(MIN_NUM_BINS, BINS_PER_SHARD * (total // shard_tokens + 1)), MAX_NUM_BINS)
        shift = np.uint64(64 - (bins - 1).bit_length())
        bin_tokens = np.zeros(1 << (64 - int(shift)), np.int64)
        for keys, lengths in _kept_keys_and_lengths(spills, split, load_drop_mask):
            np.add.at(bin_tokens, (keys >> shift).astype(np.int64), lengths)
        found += _cut_ranges(split, bin_tokens, int(shift), shard_tokens)
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


def _cut_ranges(split: str, bin_tokens: np.ndarray, shift: int, shard_tokens: int) -> Iterator[ShardKeyRange]:
    shard_index, first_key, range_tokens = 0, 0, 0
    last_filled = int(np.flatnonzero(bin_tokens)[-1]) if bin_tokens.any() else -1
    for bin_index in np.flatnonzero(bin_tokens).tolist():
        range_tokens += int(bin_tokens[bin_index])
        if range_tokens >= shard_tokens or bin_index == last_filled:
            end = ((bin_index + 1) << shift) - 1
            yield ShardKeyRange(split, shard_index, first_key, end)
            shard_index, first_key, range_tokens = shard_index + 1, end + 1, 0


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
    """Write the shard to `output`, its record and its counts of ids to `work_folder`."""
    documents: list[np.ndarray] = []
    shuffle_keys: list[np.ndarray] = []
    groups: dict[str, list[int]] = {}
    for one in spills:
        entries, start = one.select_entries(shard_range.split, shard_range.first_key, shard_range.last_key)
        if not len(entries):
            continue
        lengths = spill.document_lengths(entries, start)
        tokens = one.read_tokens(start, int(lengths.sum()), dtype)
        keep, ends = _keep_mask(one, entries, load_drop_mask), np.cumsum(lengths)
        shuffle_keys.append(entries["shuffle_key"][keep])
        documents += [tokens[end - length : end] for end, length in zip(ends[keep], lengths[keep], strict=True)]
        _count_groups(groups, spill.group_names(one.work_folder, one.unit_name), entries["group"][keep], lengths[keep])
    # Equal keys keep the order of the inputs, which is the order of the spills.
    order = np.argsort(np.concatenate(shuffle_keys), kind="stable")
    tokens = np.concatenate([documents[document] for document in order])
    shard = write_shard(output, shard_range.file_stem, tokens, len(documents), sample_tokens)
    with atomic_file(token_counts_path(work_folder, shard_range.file_stem)) as file:
        np.save(file, count_tokens(tokens, vocab_size))
    record = json.dumps({"shard": asdict(shard), "groups": groups})
    atomic_write(shard_record_path(work_folder, shard_range.file_stem), record)


def _count_groups(counts: dict[str, list[int]], names: list[str], groups: np.ndarray, lengths: np.ndarray) -> None:
    for group in np.unique(groups):
        is_in_group, name = groups == group, names[group]
        documents, tokens = counts.get(name, (0, 0))
        counts[name] = [documents + int(is_in_group.sum()), tokens + int(lengths[is_in_group].sum())]


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


def load_shard_record(work_folder: Path, file_stem: str) -> tuple[Shard, dict[str, list[int]]]:
    """Load the manifest entry of a finished shard, and the documents and tokens of each group in it."""
    record = read_json(shard_record_path(work_folder, file_stem))
    return Shard(**record["shard"]), record["groups"]
