"""Which row it was: a step whose evidence is not that of its ranges, and the words for what was found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.trainer.config import Phase
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.tools.audit.ledger_lines import Step
from tandem.trainer.tools.audit.misread_search import Mistake, Row, mistake
from tandem.trainer.tools.audit.result import Finding, ranges_words
from tandem.trainer.tools.audit.sources import Corpora, contents

FARTHEST_TOKENS = 64
"""Rows that begin at a wrong token are searched for within this distance."""
STEPS_NEAR = 3
"""Rows of neighbouring steps are numbered within so many steps."""


@dataclass(frozen=True)
class Suspect:
    """A step, and the row of its phase that it begins with."""

    step: Step
    phase: Phase
    first_row: int


def named(suspect: Suspect, corpora: Corpora) -> Finding | None:
    """What the step read, if a single mistake explains its evidence."""
    step, phase = suspect.step, suspect.phase
    names = row_sources(phase, suspect.first_row, phase.rows)
    lines = {source: _line(suspect, corpora, source, names) for source in step.taken}
    rows: dict[int, Row] = {row.row: row for _, mine, _ in lines.values() for row in mine}

    def moved(offset: int) -> list[bytes]:
        found: dict[int, bytes] = {}
        for source, (before, after) in step.taken.items():
            mine = lines[source][1]
            read = _contents(corpora, source, before + offset, after + offset, phase.seq_len)
            found |= {row.row: content for row, content in zip(mine, read or [b""] * len(mine), strict=False)}
        return [found.get(number, b"") for number in range(phase.rows)]

    offsets = [sign * offset for offset in range(1, FARTHEST_TOKENS + 1) for sign in (1, -1)]
    near = {source: (before, after) for source, (before, _, after) in lines.items()}
    found = mistake(step.ranges, [rows[number] for number in range(phase.rows)], near, moved, offsets)
    return _said(found, phase, corpora) if found else None


def unnamed(step: Step, corpora: Corpora) -> Finding:
    """That the step did not read what its cursors say, and where that is."""
    shards = [words for source, ends in step.taken.items() for words in corpora.named(source, *ends)]
    only = next(iter(step.taken)) if len(step.taken) == 1 else None
    return Finding(
        "unlike", f"step {step.number} did not read the ranges of {', '.join(step.taken)} that its cursors say, and no single "
        f"row explains it: {ranges_words(shards)}", step.number, only, shards=shards,
    )  # fmt: skip


def _line(suspect: Suspect, corpora: Corpora, source: str, names: list[str]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of the source before the step, of the step and after it: as many on each side as the step has."""
    step, phase, first = suspect.step, suspect.phase, suspect.first_row
    before, after = step.taken[source]
    count = names.count(source)
    margin = min(STEPS_NEAR * phase.rows, first)
    earlier = row_sources(phase, first - margin, margin)
    numbers = [first - margin + place for place, name in enumerate(earlier) if name == source]
    back = min(count, before // phase.seq_len)
    later = row_sources(phase, first + phase.rows, STEPS_NEAR * phase.rows)
    onward = [first + phase.rows + place for place, name in enumerate(later) if name == source]
    own = [first + place for place, name in enumerate(names) if name == source]

    def made(start: int, end: int, numbers: list[int]) -> list[Row]:
        found = []
        read = _contents(corpora, source, start, end, phase.seq_len)
        for place, (number, content) in enumerate(zip(numbers, read, strict=False)):
            steps, row = divmod(number - first, phase.rows) if 0 <= number < phase.steps * phase.rows else (0, -1)
            found.append(Row(step.number + steps, row, source, start + place * phase.seq_len, content))
        return found

    unknown = [-1] * count
    return (
        made(before - back * phase.seq_len, before, (unknown + numbers)[len(numbers) + count - back :]),
        made(before, after, own),
        made(after, after + count * phase.seq_len, onward + unknown),
    )


def _contents(corpora: Corpora, source: str, start: int, end: int, seq_len: int) -> list[bytes]:
    """What the evidence hashes of the rows at these places; nothing where they are not whole rows."""
    if start < 0 or end <= start:
        return []
    pieces, starts = corpora.rows(source, start, end, seq_len)
    return [] if pieces.tokens.sum() % seq_len else contents(source, pieces, starts)


def _said(found: Mistake, phase: Phase, corpora: Corpora) -> Finding:
    row, other, length = found.row, found.other, phase.seq_len
    on_rank = "" if found.tp_size == 1 else f", on one of {found.tp_size} tensor-parallel ranks"
    where = f"step {row.step}: row {row.row}"
    kind, lost, repeated = {
        "left out": ("lost", length, 0), "counted twice": ("repeated", 0, length), "replaced": ("repeated", length, length),
        "swapped": ("swapped", 0, 0), "dropped": ("lost", length, 0), "doubled": ("repeated", 0, length),
        "moved": ("unlike", 0, 0), "all moved": ("unlike", 0, 0),
    }[found.kind]  # fmt: skip
    shards = _ranges(row, length, corpora)
    mine = f"{row.source} {ranges_words(shards)}"
    theirs, their_name = "", ""
    if other:
        their_name = f"row {other.row}" + (f" of step {other.step}" if other.step != row.step else "")
        if other.row < 0:
            their_name = "a row of a neighbouring phase"
        more = _ranges(other, length, corpora)
        theirs, shards = f"{other.source} {ranges_words(more)}", [*shards, *more]
    ways = f"{abs(found.offset)} tokens {'further on' if found.offset > 0 else 'before'}"
    says = {
        "left out": f"{where} ({mine}) was not read",
        "counted twice": f"{where} ({mine}) was read twice",
        "replaced": f"{where} ({mine}) was not read; in its place {their_name} ({theirs}) was, which is read elsewhere too",
        "swapped": f"{where} ({mine}) and {their_name} ({theirs}) were swapped",
        "dropped": f"{where} ({mine}) was dropped: from it on each row of {row.source} read what the next one is for",
        "doubled": f"{where} ({mine}) and later ones of {row.source} read what the row before is for: that one was read twice",
        "moved": f"{where} ({mine}) was read {ways}",
        "all moved": f"step {row.step}: all rows of {row.source} were read {ways}, from row {row.row} ({mine}) on",
    }[found.kind]
    rows = [(each.step, each.row) for each in (row, other) if each]
    return Finding(kind, says + on_rank, row.step, row.source, rows, shards, lost, repeated)


def _ranges(row: Row, seq_len: int, corpora: Corpora) -> list[str]:
    fields = np.frombuffer(row.content, "<i8", offset=len(row.source.encode()) + 1).reshape(-1, 3)
    files = corpora.expansions[row.source].files
    return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in fields]
