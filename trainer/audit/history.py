"""The ledger as it counts: of every step the last attempt, in order, and what each start of the run took back.

Read twice, line by line, so that a long run takes no more memory than its starts: what counts is known only when the later
starts are. A step of an attempt counts if no later start took it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from trainer.config import Phase, UserError
from trainer.ledger import FILE

FIXED = ("seed", "block_tokens", "window_tokens")
"""Of a start: what no later start may change."""


class Step(NamedTuple):
    line: int
    number: int
    """Finished steps after it, from 1."""
    taken: dict[str, tuple[int, int]]
    """Source -> cursor before and after."""
    ranges: int
    tokens: int


class Skip(NamedTuple):
    step: int
    source: str
    shard: str


@dataclass
class Attempt:
    """One start of the run and what it made."""

    line: int
    step: int
    cursor: dict[str, int]
    fixed: dict[str, int]
    phases: list[Phase]
    fingerprints: dict[str, str]
    skipped: dict[str, list[str]]
    dp_size: int
    counts_until: float = float("inf")
    """Its steps up to this one count; a later start took back the others."""
    made: int = 0
    """Steps it made."""
    thrown_away: list[int] = field(default_factory=list)
    """First and last of its steps that do not count, how many they are and how many tokens they took; or empty."""

    @property
    def counts(self) -> bool:
        """Whether steps after it count, or would."""
        return self.step < self.counts_until

    @property
    def skips(self) -> list[tuple[str, str]]:
        """Source and shard of what it leaves out from its first step on."""
        return [(source, file) for source, files in self.skipped.items() for file in files]

    @cached_property
    def spans(self) -> list[tuple[Phase, int, int]]:
        """The phases, each with its first step and the one after its last, counted from 0."""
        found, first = [], 0
        for phase in self.phases:
            found.append((phase, first, first + phase.steps))
            first += phase.steps
        return found

    def span_of(self, number: int) -> tuple[Phase, int, int] | None:
        """The phase of the `number`-th step."""
        return next((span for span in self.spans if span[1] < number <= span[2]), None)

    def throw_away(self, step: Step) -> None:
        tokens = sum(after - before for before, after in step.taken.values())
        first, _, count, sum_tokens = self.thrown_away or [step.number, 0, 0, 0]
        self.thrown_away = [first, step.number, count + 1, sum_tokens + tokens]


class History:
    """The ledger of a run folder. Raises: UserError where there is none, or none that tells of a start."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        if not self.path.is_file():
            found = f"has no {FILE}; the folder of a run has" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {found}; name the folder of a run that has started")
        self.attempts: list[Attempt] = []
        self.unreadable: list[int] = []
        """Numbers of lines that are no ledger's, but for a torn last one."""
        self.torn = False
        """Whether the last line was torn by a kill, or is being written."""
        self.steps_made = 0
        """Lines of steps, whether they count or not."""
        for record in self._records(say=True):
            self.steps_made += isinstance(record, Step)
            if isinstance(record, Attempt):
                self.attempts.append(record)
        if not self.attempts:
            raise UserError(f"{self.path}: has no start; the run died before its first step, or this is no ledger")
        least = float("inf")
        for attempt in reversed(self.attempts):
            attempt.counts_until = least
            least = min(least, attempt.step)

    def accepted(self) -> Iterator[Attempt | Skip | Step]:
        """What counts, in the order of the file: every start, then of each start the steps and skips that no later one took
        back. Steps that do not count are added up in their attempt.
        """
        attempts, attempt = iter(self.attempts), self.attempts[0]
        for record in self._records(say=False):
            if isinstance(record, Attempt):
                attempt = next(attempts)
                yield attempt
            elif isinstance(record, Step):
                attempt.made += 1
                if record.number <= attempt.counts_until:
                    yield record
                else:
                    attempt.throw_away(record)
            elif record.step <= attempt.counts_until:
                yield record

    def _records(self, *, say: bool) -> Iterator[Attempt | Skip | Step]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _record(number, line)
                if record is not None:
                    yield record
                elif say and line.endswith(b"\n"):
                    self.unreadable.append(number)
                elif say:
                    self.torn = True


def _record(number: int, line: bytes) -> Attempt | Skip | Step | None:
    """None for a line that no ledger has."""
    try:
        tree = orjson.loads(line)
        kind = tree.pop("kind")
        if kind == "step":
            taken = {name: (int(before), int(after)) for name, (before, after) in tree["taken"].items()}
            return Step(number, int(tree["step"]), taken, int(tree["ranges"], 16), int(tree["tokens"], 16))
        return Skip(**tree) if kind == "skip" else _attempt(number, tree) if kind == "start" else None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None


def _attempt(number: int, tree: dict[str, Any]) -> Attempt:
    found = Attempt(
        number, int(tree["step"]), {name: int(at) for name, at in tree["cursor"].items()},
        {name: int(tree[name]) for name in FIXED}, [Phase(**phase) for phase in tree["phases"]],
        dict(tree["fingerprints"]), dict(tree["skipped"]), int(tree["dp_size"]),
    )  # fmt: skip
    if any(phase.rows < 1 or phase.seq_len < 1 for phase in found.phases):
        raise ValueError("a phase without rows")
    return found
