"""Find near duplicates in a whole corpus: compute from the signatures of each spill a mask of its documents to drop.

Documents that agree in a band (minhash.py) are linked. Documents that are connected by links form a cluster, and the first
of a cluster in reading order is kept. The result depends only on the signatures and the reading order, not on spills,
workers or the order in which links are found. As in SlimPajama, linked texts are not compared again. SlimPajama keeps the
document that its graph library returns first.

There are three steps: `write_bands` once per spill in its worker, `write_links` for each of `plan_band_ranges` in any process
and order, and `write_masks` once. Files appear complete or not at all, so a killed step continues with the missing files.

The folder and the masks belong to one set of spills, so clear them when inputs or settings change. Memory: a range takes
RECORDS_PER_RANGE records, 0.3 GiB, and somewhat more if the corpus has few spills and most of them contain the same
document. `write_masks` takes 4 MB per million documents (8 MB above 2^32 documents). Disk: 108 bytes per document, and 16
bytes for each band in which a document has an earlier match.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from tandem.data_prep import spill, work_files
from tandem.data_prep.work_files import DamagedWork
from tandem.trainer.disk import atomic_file

RECORDS_PER_RANGE = 1 << 22
LINKS_PER_READ = 1 << 20
_RECORD_DTYPE = np.dtype([("hash", "<u8"), ("document", "<u4")])


@dataclass(frozen=True)
class BandRange:
    """The hashes of one band between two bounds. Equal hashes are in the same range."""

    band_index: int
    low_hash: int
    high_hash: int
    links_path: Path
    """File of links: pairs of little-endian 64-bit numbers, a document and the first document that it matches. Their XXH3-128
    is the last 16 bytes."""


def write_bands(path: Path, signatures: np.ndarray) -> str:
    """Write the signatures [documents, bands] of a spill with each band sorted, so that a range reads only its part.

    Return the hash of the file.
    """
    order = signatures.argsort(axis=0, kind="stable")
    records = np.empty(signatures.T.shape, _RECORD_DTYPE)
    records["hash"] = np.take_along_axis(signatures, order, axis=0).T
    records["document"] = order.T
    with atomic_file(path) as file:
        np.save(file, records)
    return work_files.file_hash(path)


def plan_band_ranges(
    band_paths: Sequence[Path], folder: Path, records_per_range: int = RECORDS_PER_RANGE
) -> list[BandRange]:
    """Return the ranges of this corpus, whose links any process can write, in any order."""
    num_bands = len(_map_bands(band_paths[0])) if band_paths else 0
    num_ranges = max(1, -(-sum(_document_counts(band_paths)) // records_per_range))
    bounds = [(number << 64) // num_ranges for number in range(num_ranges + 1)]
    return [
        BandRange(band, bounds[number], bounds[number + 1], folder / f"links-{band}-{number:06d}-of-{num_ranges:06d}")
        for band, number in product(range(num_bands), range(num_ranges))
    ]


def write_links(band_paths: Sequence[Path], band_range: BandRange) -> None:
    """Write the links of a range to its file, unless it exists."""
    if not band_range.links_path.exists():
        digest = xxh3_128()
        with atomic_file(band_range.links_path) as file:
            for links in _find_links(band_paths, band_range):
                data = links.astype("<u8").tobytes()
                digest.update(data)
                file.write(data)
            file.write(digest.digest())


def _find_links(band_paths: Sequence[Path], band_range: BandRange) -> Iterator[np.ndarray]:
    """Link within each spill first, so that a text with many copies takes one record per spill in memory."""
    hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    num_documents_before = 0
    for path in band_paths:
        records = _map_bands(path)[band_range.band_index]
        bounds = (band_range.low_hash, band_range.high_hash)
        low, high = (bisect_left(records, bound, key=lambda record: int(record["hash"])) for bound in bounds)
        spill_hashes = records["hash"][low:high]
        spill_documents = records["document"][low:high] + np.uint64(num_documents_before)
        first, links = _link_to_first(spill_hashes, spill_documents)
        yield links
        hashes.append(spill_hashes[first])
        documents.append(spill_documents[first])
        num_documents_before += len(records)
    together = np.concatenate(hashes)
    order = together.argsort(kind="stable")
    yield _link_to_first(together[order], np.concatenate(documents)[order])[1]


def _link_to_first(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of these sorted hashes are the first of their value, and [document, first document] of the others."""
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    leaders = documents[first][np.cumsum(first) - 1]
    return first, np.stack([documents, leaders], axis=1)[~first]


def write_masks(band_paths: Sequence[Path], mask_paths: Sequence[Path], band_ranges: Sequence[BandRange]) -> int:
    """Follow all links and write the masks, unless they exist. Return the number of dropped documents."""
    if not all(path.exists() for path in mask_paths):
        lengths = _document_counts(band_paths)
        parents = np.arange(sum(lengths), dtype=np.uint32 if sum(lengths) <= 1 << 32 else np.uint64)
        for part in band_ranges:
            for links in _read_links(part.links_path, len(parents)):
                _union(parents, *links.T)
        last = np.cumsum(lengths)
        for path, start, end in zip(mask_paths, last - lengths, last, strict=True):
            with atomic_file(path) as file:
                np.save(file, parents[start:end] != np.arange(start, end))
    return sum(int(load_mask(path).sum()) for path in mask_paths)


def load_mask(path: Path) -> np.ndarray:
    """Map a mask that `write_masks` has written.  Raises: DamagedWork."""
    return work_files.map_array(path, np.bool_, _corpus_remedy(path))


def _read_links(path: Path, num_documents: int) -> Iterator[np.ndarray]:
    """Yield the links [links, 2] of a range.  Raises: DamagedWork, at the latest after the last link."""
    digest, damaged = xxh3_128(), DamagedWork(f"{path}: has changed since it was written; {_corpus_remedy(path)}")
    work_files.check_file(path, _corpus_remedy(path))
    num_links, remainder = divmod(path.stat().st_size - digest.digest_size, 2 * 8)
    if remainder or num_links < 0:
        raise damaged
    with path.open("rb") as file:
        for first in range(0, num_links, LINKS_PER_READ):
            links = np.fromfile(file, "<u8", 2 * min(LINKS_PER_READ, num_links - first))
            digest.update(links.data)
            if links.max() >= num_documents:
                raise damaged
            yield links.reshape(-1, 2)
        if file.read() != digest.digest():
            raise damaged


def _map_bands(path: Path) -> np.ndarray:
    return work_files.map_array(path, _RECORD_DTYPE, spill.damage_remedy(path))


def _corpus_remedy(path: Path) -> str:
    return f"remove {path.parent} and run the same command again"


def _union(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Merge the clusters of each pair. The root is the first document: a parent is never later than its child."""
    while len(left):
        left, right = _find_roots(parents, left), _find_roots(parents, right)
        is_separate = left != right
        left, right = np.minimum(left, right)[is_separate], np.maximum(left, right)[is_separate]
        np.minimum.at(parents, right, left)


def _find_roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    while True:
        above = parents[documents]
        top = parents[above]
        if np.array_equal(above, top):
            return above
        parents[documents] = top


def _document_counts(band_paths: Sequence[Path]) -> list[int]:
    return [_map_bands(path).shape[1] for path in band_paths]
