"""What must have been read for the evidence of a step to come out as it did: a search of all single mistakes.

The evidence is a sum of one hash a row, so a mistake adds its own difference: that of a row left out, of a row that read what
another one is for, of two that changed places, of a source whose rows all moved up or down from some row on. Two mistakes in
one step are not searched for. That another mistake than the real one fits has odds of about one in 10^12.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xxhash import xxh3_64_intdigest

TP_SIZES = (1, 2, 4, 8)
"""A sum spoilt by one of so many tensor-parallel ranks is off by that part of the difference."""

MisreadKind = Literal["left out", "counted twice", "replaced", "swapped", "dropped", "doubled", "moved", "all moved"]


@dataclass(frozen=True)
class ExpectedRow:
    """What a row is for."""

    step: int
    row_index: int
    source: str
    position: int
    """Its place in the source's reading order."""
    content: bytes
    """What is hashed after the number of the row."""


@dataclass(frozen=True)
class Misread:
    kind: MisreadKind
    """left out, counted twice: `row_index`. replaced: `row_index` read what `other_row` is for; swapped: `other_row` did
    the same. dropped: from `row_index` on all rows of its source read what the next one is for; doubled: what the one
    before is for. moved: `row_index` read `offset_tokens` tokens away; all moved: so did every row of its source.
    """
    row: ExpectedRow
    other_row: ExpectedRow | None = None
    offset_tokens: int = 0
    tp_size: int = 1
    """It was the mistake of one tensor-parallel rank of so many; 1: of all."""


SHIFTS: tuple[tuple[MisreadKind, int], ...] = (("dropped", 1), ("doubled", -1))

Candidates = Iterator[tuple[np.ndarray, Callable[..., Misread]]]
"""What each of some mistakes adds to the sum, and the mistake by its indices in the array and `tp_size`."""


def hash_rows(row_indices: Sequence[int] | np.ndarray, contents: Sequence[bytes]) -> np.ndarray:
    """The evidence of rows with these numbers in their steps; unsigned, so that sums are modulo 2^64."""
    index_bytes = [struct.pack("<q", number) for number in range(max(row_indices, default=-1) + 1)]
    pairs = zip(row_indices, contents, strict=True)
    return np.fromiter(
        (xxh3_64_intdigest(index_bytes[number] + content) for number, content in pairs), np.uint64, len(contents)
    )


def find_misread(
    recorded_digest: int,
    rows: Sequence[ExpectedRow],
    neighbours: Mapping[str, tuple[Sequence[ExpectedRow], Sequence[ExpectedRow]]],
    contents_at_offset: Callable[[int], Sequence[bytes]],
    offsets: Sequence[int],
) -> Misread | None:
    """The single mistake that makes the rows of a step sum up to `recorded_digest`, or None.

    `neighbours` are the rows of each source before and after the step's; `moved(n)` is what the rows would hold n tokens on.
    """
    row_hashes = hash_rows(range(len(rows)), [row.content for row in rows])
    delta = recorded_digest - int(row_hashes.sum())
    for candidates in (
        _row_candidates(row_hashes, rows, neighbours),
        _offset_candidates(row_hashes, rows, contents_at_offset, offsets),
    ):
        for changes, make_misread in candidates:
            for tp_size in TP_SIZES:
                hits = np.argwhere(changes == np.uint64(delta * tp_size % (1 << 64)))
                if len(hits):
                    return make_misread(*(int(index) for index in hits[0]), tp_size=tp_size)
    return None


def _row_candidates(
    row_hashes: np.ndarray,
    rows: Sequence[ExpectedRow],
    neighbours: Mapping[str, tuple[Sequence[ExpectedRow], Sequence[ExpectedRow]]],
) -> Candidates:
    yield np.uint64(0) - row_hashes, lambda row, **of: Misread("left out", rows[row], **of)
    yield row_hashes, lambda row, **of: Misread("counted twice", rows[row], **of)
    others = [*rows, *(row for before, after in neighbours.values() for row in (*before, *after))]
    row_indices = np.repeat(np.arange(len(rows)), len(others))
    change = (
        hash_rows(row_indices, [row.content for row in others] * len(rows)).reshape(len(rows), len(others))
        - row_hashes[:, None]
    )
    yield change, lambda row, other, **of: Misread("replaced", rows[row], others[other], **of)
    within = change[:, : len(rows)]
    yield within + within.T, lambda row, other, **of: Misread("swapped", rows[row], rows[other], **of)
    index = {id(row): place for place, row in enumerate(others)}
    for source, (before, after) in neighbours.items():
        source_rows = [row for row in rows if row.source == source]
        reading_order = np.array([index[id(row)] for row in (*before, *source_rows, *after)])
        places = np.arange(len(before), len(before) + len(source_rows))
        for kind, shift in SHIFTS:
            if source_rows and places[0] + shift >= 0 and places[-1] + shift < len(reading_order):
                changes = change[reading_order[places], reading_order[places + shift]]
                yield np.cumsum(changes[::-1])[::-1], _shift_maker(kind, source_rows)


def _shift_maker(kind: MisreadKind, source_rows: Sequence[ExpectedRow]) -> Callable[..., Misread]:
    return lambda first, **of: Misread(kind, source_rows[first], **of)


def _offset_candidates(
    row_hashes: np.ndarray,
    rows: Sequence[ExpectedRow],
    contents_at_offset: Callable[[int], Sequence[bytes]],
    offsets: Sequence[int],
) -> Candidates:
    names = np.array([row.source for row in rows])
    for offset in offsets:
        contents = contents_at_offset(offset)
        changes = hash_rows(range(len(rows)), contents) - row_hashes
        yield changes, lambda row, offset=offset, **of: Misread("moved", rows[row], offset_tokens=offset, **of)
        for source in dict.fromkeys(row.source for row in rows):
            row_indices = np.flatnonzero(names == source)
            first = rows[row_indices[0]]
            yield changes[row_indices].sum(keepdims=True), _source_offset_maker(first, offset)


def _source_offset_maker(first: ExpectedRow, offset: int) -> Callable[..., Misread]:
    return lambda _, **of: Misread("all moved", first, offset_tokens=offset, **of)
