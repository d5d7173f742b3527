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

Kind = Literal["left out", "counted twice", "replaced", "swapped", "dropped", "doubled", "moved", "all moved"]


@dataclass(frozen=True)
class Row:
    """What a row is for."""

    step: int
    row: int
    source: str
    start: int
    """Its place in the source's reading order."""
    content: bytes
    """What is hashed after the number of the row."""


@dataclass(frozen=True)
class Mistake:
    kind: Kind
    """left out, counted twice: `row`. replaced: `row` read what `other` is for; swapped: `other` did the same. dropped: from
    `row` on all rows of its source read what the next one is for; doubled: what the one before is for. moved: `row` read
    `offset` tokens away; all moved: so did every row of its source.
    """
    row: Row
    other: Row | None = None
    offset: int = 0
    tp_size: int = 1
    """It was the mistake of one tensor-parallel rank of so many; 1: of all."""


LINES: tuple[tuple[Kind, int], ...] = (("dropped", 1), ("doubled", -1))

Candidates = Iterator[tuple[np.ndarray, Callable[..., Mistake]]]
"""What each of some mistakes adds to the sum, and the mistake by its indices in the array and `tp_size`."""


def digests(numbers: Sequence[int] | np.ndarray, contents: Sequence[bytes]) -> np.ndarray:
    """The evidence of rows with these numbers in their steps; unsigned, so that sums are modulo 2^64."""
    heads = [struct.pack("<q", number) for number in range(max(numbers, default=-1) + 1)]
    pairs = zip(numbers, contents, strict=True)
    return np.fromiter(
        (xxh3_64_intdigest(heads[number] + content) for number, content in pairs), np.uint64, len(contents)
    )


def mistake(
    recorded: int,
    rows: Sequence[Row],
    near: Mapping[str, tuple[Sequence[Row], Sequence[Row]]],
    moved: Callable[[int], Sequence[bytes]],
    offsets: Sequence[int],
) -> Mistake | None:
    """The single mistake that makes the rows of a step sum up to `recorded`, or None.

    `near` are the rows of each source before and after the step's; `moved(n)` is what the rows would hold n tokens on.
    """
    own = digests(range(len(rows)), [row.content for row in rows])
    delta = recorded - int(own.sum())
    for search in (_of_other_rows(own, rows, near), _of_offsets(own, rows, moved, offsets)):
        for changes, named in search:
            for tp_size in TP_SIZES:
                hits = np.argwhere(changes == np.uint64(delta * tp_size % (1 << 64)))
                if len(hits):
                    return named(*(int(index) for index in hits[0]), tp_size=tp_size)
    return None


def _of_other_rows(
    own: np.ndarray, rows: Sequence[Row], near: Mapping[str, tuple[Sequence[Row], Sequence[Row]]]
) -> Candidates:
    yield np.uint64(0) - own, lambda row, **of: Mistake("left out", rows[row], **of)
    yield own, lambda row, **of: Mistake("counted twice", rows[row], **of)
    others = [*rows, *(row for before, after in near.values() for row in (*before, *after))]
    numbers = np.repeat(np.arange(len(rows)), len(others))
    change = (
        digests(numbers, [row.content for row in others] * len(rows)).reshape(len(rows), len(others)) - own[:, None]
    )
    yield change, lambda row, other, **of: Mistake("replaced", rows[row], others[other], **of)
    within = change[:, : len(rows)]
    yield within + within.T, lambda row, other, **of: Mistake("swapped", rows[row], rows[other], **of)
    index = {id(row): place for place, row in enumerate(others)}
    for source, (before, after) in near.items():
        mine = [row for row in rows if row.source == source]
        line = np.array([index[id(row)] for row in (*before, *mine, *after)])
        places = np.arange(len(before), len(before) + len(mine))
        for kind, by in LINES:
            if mine and places[0] + by >= 0 and places[-1] + by < len(line):
                changes = change[line[places], line[places + by]]
                yield np.cumsum(changes[::-1])[::-1], _from_row_on(kind, mine)


def _from_row_on(kind: Kind, mine: Sequence[Row]) -> Callable[..., Mistake]:
    return lambda first, **of: Mistake(kind, mine[first], **of)


def _of_offsets(
    own: np.ndarray, rows: Sequence[Row], moved: Callable[[int], Sequence[bytes]], offsets: Sequence[int]
) -> Candidates:
    names = np.array([row.source for row in rows])
    for offset in offsets:
        contents = moved(offset)
        changes = digests(range(len(rows)), contents) - own
        yield changes, lambda row, offset=offset, **of: Mistake("moved", rows[row], offset=offset, **of)
        for source in dict.fromkeys(row.source for row in rows):
            mine = np.flatnonzero(names == source)
            first = rows[mine[0]]
            yield changes[mine].sum(keepdims=True), _all(first, offset)


def _all(first: Row, offset: int) -> Callable[..., Mistake]:
    return lambda _, **of: Mistake("all moved", first, offset=offset, **of)
