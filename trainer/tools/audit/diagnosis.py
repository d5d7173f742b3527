"""Find the mistake that explains the ranges digest of a step, and describe it.

The digest is a sum of one hash per row, so each mistake changes the sum by a known difference. The search covers one row that
is left out, counted twice, replaced by another row or swapped with it, and rows of a source shifted by one row or by some
tokens. It does not cover two mistakes in one step. The probability that it finds a wrong explanation is about one in 10^12.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.trainer.config import PhaseConfig
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_lines import StepLine
from tandem.trainer.tools.audit.reading_order import Sources, cut_rows, row_contents
from tandem.trainer.tools.audit.result import Finding, format_shard_ranges

MAX_OFFSET_TOKENS = 64
"""Largest distance at which the search looks for rows that begin at a wrong token."""
NUM_NEIGHBOUR_STEPS = 3
"""The message has the index of a row in a neighbouring step if that step is at most this far away."""
TP_SIZES = (1, 2, 4, 8)
"""If only one of n tensor-parallel ranks misreads, the averaged sum changes by 1/n of the difference."""
MISREADS = {
    "left out": ("lost", 1, 0, "{row} ({ranges}) was not read"),
    "counted twice": ("repeated", 0, 1, "{row} ({ranges}) was read twice"),
    "replaced": ("repeated", 1, 1, "{row} ({ranges}) was not read; {other} ({other_ranges}), which is also read elsewhere, was "
                                   "read in its place"),
    "swapped": ("swapped", 0, 0, "{row} ({ranges}) and {other} ({other_ranges}) were swapped"),
    "dropped": ("lost", 1, 0, "{row} ({ranges}) was dropped: from it on, each row of {source} read the tokens of the next row"),
    "doubled": ("repeated", 0, 1, "{row} ({ranges}) and later rows of {source} read the tokens of the row before, which was "
                                  "read twice"),
    "moved": ("unlike", 0, 0, "{row} ({ranges}) was read {distance}"),
    "all moved": ("unlike", 0, 0, "step {step}: all rows of {source} were read {distance}, from row {row_index} ({ranges}) on"),
}  # fmt: skip
"""Mistake -> kind of finding, rows lost, rows repeated, message. "dropped" and "doubled" affect the row and all later rows of
its source in the step. "all moved" affects all rows of its source."""


@dataclass(frozen=True)
class ExpectedRow:
    """A row and the ranges that it has to read."""

    step: int
    row_index: int
    """Index in the step; -1 if unknown."""
    source: str
    content: bytes
    """The bytes that the digest hashes after the row's index."""


Rows = Sequence[ExpectedRow]
Candidates = Iterator[tuple[str, np.ndarray, Rows, Rows, int]]
"""Mistake, what it adds to the sum for each row (or row and other row), the rows, the other rows, and the offset in tokens."""


def hash_rows(row_indices: Sequence[int] | np.ndarray, contents: Sequence[bytes]) -> np.ndarray:
    """Hash rows with their indices in the step. The hashes are unsigned, so that sums are modulo 2^64."""
    index_bytes = [struct.pack("<q", number) for number in range(max(row_indices, default=-1) + 1)]
    pairs = zip(row_indices, contents, strict=True)
    hashes = (xxh3_64_intdigest(index_bytes[number] + content) for number, content in pairs)
    return np.fromiter(hashes, np.uint64, len(contents))


def diagnose(step: StepLine, phase: PhaseConfig, first_row: int, sources: Sources) -> Finding | None:
    """Describe the single mistake that explains the ranges digest of a step, or return None if there is none.

    `first_row` is the index in the phase of the step's first row.
    """
    around = {source: _rows_around(step, phase, first_row, sources, source) for source in step.read_ranges}
    rows = sorted((row for _, own, _ in around.values() for row in own), key=lambda row: row.row_index)

    def contents_at(offset: int) -> list[bytes]:
        contents = [b""] * len(rows)
        for source, (start, end) in step.read_ranges.items():
            found = _row_contents(sources, source, start + offset, end + offset, phase.seq_len)
            for row, content in zip(around[source][1], found, strict=False):
                contents[row.row_index] = content
        return contents

    row_hashes = hash_rows(range(len(rows)), [row.content for row in rows])
    delta = step.ranges_digest - int(row_hashes.sum())
    for mistake, changes, firsts, others, offset in _candidates(row_hashes, rows, [*around.values()], contents_at):
        for tp_size in TP_SIZES:
            if len(hits := np.argwhere(changes == np.uint64(delta * tp_size % (1 << 64)))):
                row, other = firsts[hits[0][0]], others[hits[0][1]] if len(others) else None
                return _describe(mistake, row, other, offset, tp_size, phase.seq_len, sources)
    return None


def _rows_around(
    step: StepLine, phase: PhaseConfig, first_row: int, sources: Sources, source: str
) -> tuple[Rows, Rows, Rows]:
    """Build the rows of the source before, in and after the step. Each side has as many rows as the step."""
    start, end = step.read_ranges[source]
    num_rows, margin = phase.global_batch_size, NUM_NEIGHBOUR_STEPS * phase.global_batch_size
    first, end_row = max(first_row - margin, 0), first_row + num_rows
    names = row_sources(phase, first, end_row + margin - first)
    indices = [first + place for place, name in enumerate(names) if name == source]
    earlier, later = [i for i in indices if i < first_row], [i for i in indices if i >= end_row]
    own = indices[len(earlier) : len(indices) - len(later)]
    unknown, num_before = [-1] * len(own), min(len(own), start // phase.seq_len)

    def build_rows(start: int, end: int, phase_indices: list[int]) -> list[ExpectedRow]:
        found, contents = [], _row_contents(sources, source, start, end, phase.seq_len)
        for index, content in zip(phase_indices, contents, strict=False):
            is_known = 0 <= index < phase.num_steps * num_rows
            steps, row_index = divmod(index - first_row, num_rows) if is_known else (0, -1)
            found.append(ExpectedRow(step.step + steps, row_index, source, content))
        return found

    before_indices = (unknown + earlier)[len(earlier) + len(own) - num_before :]
    return (
        build_rows(start - num_before * phase.seq_len, start, before_indices),
        build_rows(start, end, own),
        build_rows(end, end + len(own) * phase.seq_len, later + unknown),
    )


def _row_contents(sources: Sources, source: str, start: int, end: int, seq_len: int) -> list[bytes]:
    """Return the content of each row at positions [start, end), or nothing if these are not whole rows."""
    if start < 0 or end <= start:
        return []
    ranges, row_starts = cut_rows(sources.shard_ranges(source, start, end)[0], seq_len)
    return [] if ranges.tokens.sum() % seq_len else row_contents(source, ranges, row_starts)


def _candidates(
    hashes: np.ndarray, rows: Rows, around: list[tuple[Rows, Rows, Rows]], contents_at: Callable[[int], list[bytes]]
) -> Candidates:
    yield "left out", np.uint64(0) - hashes, rows, (), 0
    yield "counted twice", hashes, rows, (), 0
    others = [*rows, *(row for before, _, after in around for row in (*before, *after))]
    row_indices = np.repeat(np.arange(len(rows)), len(others))
    other_hashes = hash_rows(row_indices, [row.content for row in others] * len(rows)).reshape(len(rows), len(others))
    change = other_hashes - hashes[:, None]
    yield "replaced", change, rows, others, 0
    within = change[:, : len(rows)]
    yield "swapped", within + within.T, rows, rows, 0
    place_in_others = {id(row): place for place, row in enumerate(others)}
    for before, own, after in around:
        reading_order = np.array([place_in_others[id(row)] for row in (*before, *own, *after)])
        places = np.arange(len(before), len(before) + len(own))
        for mistake, shift in (("dropped", 1), ("doubled", -1)):
            if len(own) and places[0] + shift >= 0 and places[-1] + shift < len(reading_order):
                changes = change[reading_order[places], reading_order[places + shift]]
                yield mistake, np.cumsum(changes[::-1])[::-1], own, (), 0
    for offset in (sign * distance for distance in range(1, MAX_OFFSET_TOKENS + 1) for sign in (1, -1)):
        changes = hash_rows(range(len(rows)), contents_at(offset)) - hashes
        yield "moved", changes, rows, (), offset
        for _, own, _ in around:
            if own:
                yield "all moved", changes[[row.row_index for row in own]].sum(keepdims=True), own[:1], (), offset


def _describe(
    mistake: str, row: ExpectedRow, other: ExpectedRow | None, offset: int, tp_size: int, seq_len: int, sources: Sources
) -> Finding:
    def shard_range_names(row: ExpectedRow) -> list[str]:
        fields = np.frombuffer(row.content, "<i8", offset=len(row.source.encode()) + 1).reshape(-1, 3)
        files = sources.reading_orders[row.source].shard_files
        return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in fields]

    kind, lost, repeated, message = MISREADS[mistake]
    names, rows = shard_range_names(row), [(row.step, row.row_index)]
    facts = {
        "row": f"step {row.step}: row {row.row_index}", "ranges": f"{row.source} {format_shard_ranges(names)}",
        "source": row.source, "step": row.step, "row_index": row.row_index,
        "distance": f"{abs(offset)} tokens {'later' if offset > 0 else 'earlier'}",
    }  # fmt: skip
    if other:
        place = f" of step {other.step}" if other.step != row.step else ""
        facts["other"] = f"row {other.row_index}{place}" if other.row_index >= 0 else "a row of a neighbouring phase"
        other_names = shard_range_names(other)
        facts["other_ranges"] = f"{other.source} {format_shard_ranges(other_names)}"
        names, rows = names + other_names, [*rows, (other.step, other.row_index)]
    on_ranks = f", on one of {tp_size} tensor-parallel ranks" if tp_size > 1 else ""
    message = message.format(**facts) + on_ranks
    return Finding(kind, message, row.step, row.source, rows, names, lost * seq_len, repeated * seq_len)
