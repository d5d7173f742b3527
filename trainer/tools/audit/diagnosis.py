"""Which row it was: a step whose evidence is not that of its ranges, and the words for what was found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.trainer.config import PhaseConfig
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_lines import StepLine
from tandem.trainer.tools.audit.misread_search import ExpectedRow, Misread, find_misread
from tandem.trainer.tools.audit.result import Finding, format_shard_ranges
from tandem.trainer.tools.audit.sources import Sources, row_contents

MAX_OFFSET_TOKENS = 64
"""Rows that begin at a wrong token are searched for within this distance."""
NUM_NEIGHBOUR_STEPS = 3
"""Rows of neighbouring steps are numbered within so many steps."""


@dataclass(frozen=True)
class SuspectStep:
    """A step, and the row of its phase that it begins with."""

    step: StepLine
    phase: PhaseConfig
    first_row: int


def diagnose(suspect: SuspectStep, sources: Sources) -> Finding | None:
    """What the step read, if a single mistake explains its evidence."""
    step, phase = suspect.step, suspect.phase
    sources_by_row = row_sources(phase, suspect.first_row, phase.global_batch_size)
    rows_by_source = {source: _neighbour_rows(suspect, sources, source, sources_by_row) for source in step.read_ranges}
    rows: dict[int, ExpectedRow] = {row.row_index: row for _, mine, _ in rows_by_source.values() for row in mine}

    def contents_at_offset(offset: int) -> list[bytes]:
        found: dict[int, bytes] = {}
        for source, (before, after) in step.read_ranges.items():
            source_rows = rows_by_source[source][1]
            read = _row_contents(sources, source, before + offset, after + offset, phase.seq_len)
            found |= {
                row.row_index: content
                for row, content in zip(source_rows, read or [b""] * len(source_rows), strict=False)
            }
        return [found.get(number, b"") for number in range(phase.global_batch_size)]

    offsets = [sign * offset for offset in range(1, MAX_OFFSET_TOKENS + 1) for sign in (1, -1)]
    neighbours = {source: (before, after) for source, (before, _, after) in rows_by_source.items()}
    misread = find_misread(
        step.ranges_digest,
        [rows[number] for number in range(phase.global_batch_size)],
        neighbours,
        contents_at_offset,
        offsets,
    )
    return _describe_misread(misread, phase, sources) if misread else None


def unexplained_finding(step: StepLine, sources: Sources) -> Finding:
    """That the step did not read what its cursors say, and where that is."""
    shards = sources.step_range_names(step.read_ranges)
    single_source = next(iter(step.read_ranges)) if len(step.read_ranges) == 1 else None
    return Finding(
        "unlike", f"step {step.step} did not read the ranges of {', '.join(step.read_ranges)} that its cursors "
        f"say, and no single "
        f"row explains it: {format_shard_ranges(shards)}", step.step, single_source, shard_ranges=shards,
    )  # fmt: skip


def _neighbour_rows(
    suspect: SuspectStep, sources: Sources, source: str, sources_by_row: list[str]
) -> tuple[list[ExpectedRow], list[ExpectedRow], list[ExpectedRow]]:
    """Rows of the source before the step, of the step and after it: as many on each side as the step has."""
    step, phase, first = suspect.step, suspect.phase, suspect.first_row
    before, after = step.read_ranges[source]
    count = sources_by_row.count(source)
    margin = min(NUM_NEIGHBOUR_STEPS * phase.global_batch_size, first)
    earlier = row_sources(phase, first - margin, margin)
    earlier_indices = [first - margin + place for place, name in enumerate(earlier) if name == source]
    num_rows_before = min(count, before // phase.seq_len)
    later = row_sources(phase, first + phase.global_batch_size, NUM_NEIGHBOUR_STEPS * phase.global_batch_size)
    later_indices = [first + phase.global_batch_size + place for place, name in enumerate(later) if name == source]
    own_indices = [first + place for place, name in enumerate(sources_by_row) if name == source]

    def build_rows(start: int, end: int, numbers: list[int]) -> list[ExpectedRow]:
        found = []
        read = _row_contents(sources, source, start, end, phase.seq_len)
        for place, (number, content) in enumerate(zip(numbers, read, strict=False)):
            steps, row = (
                divmod(number - first, phase.global_batch_size)
                if 0 <= number < phase.num_steps * phase.global_batch_size
                else (0, -1)
            )
            found.append(ExpectedRow(step.step + steps, row, source, start + place * phase.seq_len, content))
        return found

    unknown = [-1] * count
    return (
        build_rows(
            before - num_rows_before * phase.seq_len,
            before,
            (unknown + earlier_indices)[len(earlier_indices) + count - num_rows_before :],
        ),
        build_rows(before, after, own_indices),
        build_rows(after, after + count * phase.seq_len, later_indices + unknown),
    )


def _row_contents(sources: Sources, source: str, start: int, end: int, seq_len: int) -> list[bytes]:
    """What the evidence hashes of the rows at these places; nothing where they are not whole rows."""
    if start < 0 or end <= start:
        return []
    pieces, starts = sources.cut_rows(source, start, end, seq_len)
    return [] if pieces.tokens.sum() % seq_len else row_contents(source, pieces, starts)


def _describe_misread(misread: Misread, phase: PhaseConfig, sources: Sources) -> Finding:
    row, other, length = misread.row, misread.other_row, phase.seq_len
    on_rank = "" if misread.tp_size == 1 else f", on one of {misread.tp_size} tensor-parallel ranks"
    row_name = f"step {row.step}: row {row.row_index}"
    kind, lost, repeated = {
        "left out": ("lost", length, 0), "counted twice": ("repeated", 0, length), "replaced": ("repeated", length, length),
        "swapped": ("swapped", 0, 0), "dropped": ("lost", length, 0), "doubled": ("repeated", 0, length),
        "moved": ("unlike", 0, 0), "all moved": ("unlike", 0, 0),
    }[misread.kind]  # fmt: skip
    shard_ranges = _row_ranges(row, length, sources)
    row_ranges = f"{row.source} {format_shard_ranges(shard_ranges)}"
    other_ranges, other_name = "", ""
    if other:
        other_name = f"row {other.row_index}" + (f" of step {other.step}" if other.step != row.step else "")
        if other.row_index < 0:
            other_name = "a row of a neighbouring phase"
        other_shard_ranges = _row_ranges(other, length, sources)
        other_ranges, shard_ranges = (
            f"{other.source} {format_shard_ranges(other_shard_ranges)}",
            [*shard_ranges, *other_shard_ranges],
        )
    distance = f"{abs(misread.offset_tokens)} tokens {'further on' if misread.offset_tokens > 0 else 'before'}"
    messages = {
        "left out": f"{row_name} ({row_ranges}) was not read",
        "counted twice": f"{row_name} ({row_ranges}) was read twice",
        "replaced": f"{row_name} ({row_ranges}) was not read; in its place {other_name} ({other_ranges}) was, "
        f"which is read elsewhere too",
        "swapped": f"{row_name} ({row_ranges}) and {other_name} ({other_ranges}) were swapped",
        "dropped": f"{row_name} ({row_ranges}) was dropped: from it on each row of {row.source} read what the next one is for",
        "doubled": f"{row_name} ({row_ranges}) and later ones of {row.source} read what the row before is for: "
        f"that one was read twice",
        "moved": f"{row_name} ({row_ranges}) was read {distance}",
        "all moved": f"step {row.step}: all rows of {row.source} were read {distance}, from row {row.row_index} "
        f"({row_ranges}) on",
    }[misread.kind]
    rows = [(each.step, each.row_index) for each in (row, other) if each]
    return Finding(kind, messages + on_rank, row.step, row.source, rows, shard_ranges, lost, repeated)


def _row_ranges(row: ExpectedRow, seq_len: int, sources: Sources) -> list[str]:
    fields = np.frombuffer(row.content, "<i8", offset=len(row.source.encode()) + 1).reshape(-1, 3)
    files = sources.reading_orders[row.source].shard_files
    return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in fields]
