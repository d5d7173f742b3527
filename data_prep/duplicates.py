"""Near duplicates over a whole corpus: from the signatures of each spill to a mask of its documents to drop.

Documents that agree in a band (minhash.py) are linked, links are followed (A like B, B like C: one cluster), and of
a cluster the first document in reading order stays. The answer depends on the signatures and the reading order
alone: not on spills, workers, or the order in which links are found. A pair of texts is not looked at again, as in
SlimPajama, which keeps whichever document its graph library names first.

In a pipeline; all files appear whole, and a killed step goes on with those that are missing:

    write_bands(bands, signatures)                  # in the worker, once a spill: minhash.signatures of its documents
    write_links(all_bands, part)                    # for each of parts(all_bands, folder), by anybody, in any order
    write_masks(all_bands, masks, parts)            # once, over all spills in reading order
    np.load(mask)[index]                            # True: drop this document of the spill

The folder and the masks belong to one set of spills: clear them when inputs or settings change. A part holds
RECORDS records, 0.3 GiB, and some more if the corpus has few spills and one document in most of them; following links
holds 4 MB per million documents (8 above 2^32 documents) in one process. On disk: 108 bytes a document, and
16 bytes for each band in which a document has an earlier like.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from tandem.trainer.disk import whole_file

RECORDS = 1 << 22
LINKS = 1 << 20
_RECORD = np.dtype([("hash", "<u8"), ("document", "<u4")])


@dataclass(frozen=True)
class Part:
    """The hashes of one band between two bounds: all equal ones are together."""

    band: int
    low: int
    high: int
    path: Path
    """Its links: pairs of little-endian 64-bit numbers, a document and the first one that is like it."""


def write_bands(path: Path, signatures: np.ndarray) -> None:
    """The signatures [documents, bands] of a unit, each band sorted, so that parts read only what is theirs."""
    order = signatures.argsort(axis=0, kind="stable")
    records = np.empty(signatures.T.shape, _RECORD)
    records["hash"] = np.take_along_axis(signatures, order, axis=0).T
    records["document"] = order.T
    with whole_file(path) as file:
        np.save(file, records)


def parts(bands: Sequence[Path], folder: Path, records: int = RECORDS) -> list[Part]:
    """The parts of this corpus, which any processes may do in any order."""
    num_bands = len(np.load(bands[0], mmap_mode="r")) if bands else 0
    ranges = max(1, -(-sum(_lengths(bands)) // records))
    bounds = [(number << 64) // ranges for number in range(ranges + 1)]
    return [
        Part(band, bounds[number], bounds[number + 1], folder / f"links-{band}-{number:06d}-of-{ranges:06d}")
        for band, number in product(range(num_bands), range(ranges))
    ]


def write_links(bands: Sequence[Path], part: Part) -> None:
    """The links of a part are in its file."""
    if not part.path.exists():
        with whole_file(part.path) as file:
            for links in _links(bands, part):
                file.write(links.astype("<u8").tobytes())


def _links(bands: Sequence[Path], part: Part) -> Iterator[np.ndarray]:
    """First within each unit, so that of a text that is everywhere one record a unit is held at a time."""
    hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    before = 0
    for path in bands:
        records = np.load(path, mmap_mode="r")[part.band]
        inside = records[_place(records, part.low) : _place(records, part.high)]
        first, links = _grouped(inside["hash"], inside["document"] + np.uint64(before))
        yield links
        hashes.append(inside["hash"][first])
        documents.append(inside["document"][first] + np.uint64(before))
        before += len(records)
    together = np.concatenate(hashes)
    order = together.argsort(kind="stable")
    yield _grouped(together[order], np.concatenate(documents)[order])[1]


def _place(records: np.ndarray, bound: int) -> int:
    return bisect_left(records, bound, key=lambda record: int(record["hash"]))


def _grouped(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted hashes: whether each is the first of its value; and of the others [document, first document]."""
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    leaders = documents[first][np.cumsum(first) - 1]
    return first, np.stack([documents, leaders], axis=1)[~first]


def write_masks(bands: Sequence[Path], masks: Sequence[Path], done: Sequence[Part]) -> int:
    """All links are followed and the masks written; how many documents they drop."""
    if not all(path.exists() for path in masks):
        lengths = _lengths(bands)
        parents = np.arange(sum(lengths), dtype=np.uint32 if sum(lengths) <= 1 << 32 else np.uint64)
        for part in done:
            with part.path.open("rb") as file:
                while len(links := np.fromfile(file, "<u8", 2 * LINKS)):
                    _join(parents, *links.reshape(-1, 2).T)
        last = np.cumsum(lengths)
        for path, start, end in zip(masks, last - lengths, last, strict=True):
            with whole_file(path) as file:
                np.save(file, parents[start:end] != np.arange(start, end))
    return sum(int(np.load(path).sum()) for path in masks)


def _join(parents: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Each pair has one root, the first document of its cluster: a parent is never later than its child."""
    while len(one):
        one, other = _roots(parents, one), _roots(parents, other)
        apart = one != other
        one, other = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        np.minimum.at(parents, other, one)


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    while True:
        above = parents[documents]
        top = parents[above]
        if np.array_equal(above, top):
            return above
        parents[documents] = top


def _lengths(bands: Sequence[Path]) -> list[int]:
    return [np.load(path, mmap_mode="r").shape[1] for path in bands]
