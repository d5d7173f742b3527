"""The global shuffle: documents in the order of their ranks, cut into shards, each gathered from all spills.

A shard is a range of ranks, so it can be written by anybody, at any time, without the others. The ranges follow from how
many tokens lie at which rank, counted in bins: a shard ends with the first bin that makes it full.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tandem.data_prep import spill
from tandem.data_prep.shard_writer import write_shard
from tandem.data_prep.spill import SPLITS, Spill
from tandem.trainer.data.manifest import Shard
from tandem.trainer.disk import whole_file, write_whole

BINS_PER_SHARD = 256
"""A shard is larger than it must be by a bin at most."""
SMALLEST_BINS, LARGEST_BINS = 1 << 12, 1 << 24
Dropped = Callable[[Spill], np.ndarray | None]
"""Of a spill: which of its documents, in the order read, are left out after all; None for none of them."""
COUNT_TOKENS = 1 << 20
"""Ids counted at a time: numpy widens them to 64 bits for it."""


@dataclass(frozen=True)
class Range:
    """Documents of one shard: those of the split with ranks from `first` to `last`."""

    split: str
    number: int
    first: int
    last: int

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.number:06d}"


def ranges(spills: list[Spill], dropped: Dropped, shard_tokens: int) -> list[Range]:
    """The ranges of all shards; every one holds a document.

    Note: the result depends on the documents and `shard_tokens`, not on how documents are spread over spills.
    """
    found: list[Range] = []
    for split in SPLITS:
        total = sum(int(lengths.sum()) for _, lengths in _kept(spills, split, dropped))
        bins = min(max(SMALLEST_BINS, BINS_PER_SHARD * (total // shard_tokens + 1)), LARGEST_BINS)
        shift = np.uint64(64 - (bins - 1).bit_length())
        tokens = np.zeros(1 << (64 - int(shift)), np.int64)
        for ranks, lengths in _kept(spills, split, dropped):
            np.add.at(tokens, (ranks >> shift).astype(np.int64), lengths)
        found += _cut(split, tokens, int(shift), shard_tokens)
    return found


def _kept(spills: list[Spill], split: str, dropped: Dropped) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranks and lengths of the documents of each spill."""
    for one in spills:
        entries, start = one.documents(split, 0, 2**64 - 1)
        keep = _keep(one, entries, dropped)
        yield entries["rank"][keep], spill.lengths(entries, start)[keep]


def _keep(one: Spill, entries: np.ndarray, dropped: Dropped) -> np.ndarray | slice:
    mask = dropped(one)
    return slice(None) if mask is None else ~mask[entries["document"]]


def _cut(split: str, tokens: np.ndarray, shift: int, shard_tokens: int) -> Iterator[Range]:
    number, first, held = 0, 0, 0
    last_filled = int(np.flatnonzero(tokens)[-1]) if tokens.any() else -1
    for bin_index in np.flatnonzero(tokens).tolist():
        held += int(tokens[bin_index])
        if held >= shard_tokens or bin_index == last_filled:
            end = ((bin_index + 1) << shift) - 1
            yield Range(split, number, first, end)
            number, first, held = number + 1, end + 1, 0


def shard_record_path(work: Path, stem: str) -> Path:
    """The file whose presence says that the shard is finished."""
    return work / f"{stem}.json"


def occurrences_path(work: Path, stem: str) -> Path:
    """How often each id occurs in the shard."""
    return work / f"{stem}.occurrences.npy"


def gather(
    output: Path,
    work: Path,
    spills: list[Spill],
    dropped: Dropped,
    span: Range,
    *,
    dtype: str,
    vocab: int,
    sample_tokens: int,
) -> None:
    """The shard lies in `output`, its record and its count of ids in `work`."""
    documents: list[np.ndarray] = []
    ranks: list[np.ndarray] = []
    groups: dict[str, list[int]] = {}
    for one in spills:
        entries, start = one.documents(span.split, span.first, span.last)
        if not len(entries):
            continue
        lengths = spill.lengths(entries, start)
        tokens = one.tokens(start, int(lengths.sum()), dtype)
        keep, ends = _keep(one, entries, dropped), np.cumsum(lengths)
        ranks.append(entries["rank"][keep])
        documents += [tokens[end - length : end] for end, length in zip(ends[keep], lengths[keep], strict=True)]
        _count_groups(groups, spill.groups(one.work, one.unit), entries["group"][keep], lengths[keep])
    # Equal ranks stay in the order of the inputs, which is that of the spills.
    order = np.argsort(np.concatenate(ranks), kind="stable")
    tokens = np.concatenate([documents[document] for document in order])
    shard = write_shard(output, span.stem, tokens, len(documents), sample_tokens)
    with whole_file(occurrences_path(work, span.stem)) as file:
        np.save(file, _occurrences(tokens, vocab))
    write_whole(shard_record_path(work, span.stem), json.dumps({"shard": asdict(shard), "groups": groups}))


def _count_groups(counts: dict[str, list[int]], names: list[str], groups: np.ndarray, lengths: np.ndarray) -> None:
    for group in np.unique(groups):
        inside, name = groups == group, names[group]
        documents, tokens = counts.get(name, (0, 0))
        counts[name] = [documents + int(inside.sum()), tokens + int(lengths[inside].sum())]


def _occurrences(tokens: np.ndarray, vocab: int) -> np.ndarray:
    counts = np.zeros(vocab, np.int64)
    for first in range(0, len(tokens), COUNT_TOKENS):
        counts += np.bincount(tokens[first : first + COUNT_TOKENS], minlength=vocab)
    return counts


def written(work: Path, stem: str) -> tuple[Shard, dict[str, list[int]]]:
    """What the manifest says of a finished shard, and documents and tokens of each group in it."""
    record = json.loads(shard_record_path(work, stem).read_text(encoding="utf-8"))
    return Shard(**record["shard"]), record["groups"]
