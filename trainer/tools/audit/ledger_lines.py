"""The lines of a ledger as records: strict about keys, types and sizes, so that nothing an edited line says comes further.

The one idea: a line is exactly what the trainer writes, or it is unreadable; no reader after this one has to doubt a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import orjson

from tandem.trainer.config import Phase, section_from
from tandem.trainer.data.ledger import Decision

FIXED = ("seed", "block_tokens", "window_tokens")
"""Of a start: what no later start may change."""
MOST = 1 << 60
"""Numbers in a ledger are smaller: sums of a few of them still fit into 64 bits."""
MOST_ROWS = 1 << 20
"""Rows in a step are fewer: lists of them still fit into memory."""


class Step(NamedTuple):
    line: int
    number: int
    """Finished steps after it, from 1."""
    taken: dict[str, tuple[int, int]]
    """Source -> cursor before and after."""
    ranges: int
    tokens: int


@dataclass(frozen=True)
class Skip:
    step: int
    source: str
    shard: str


@dataclass(frozen=True)
class Bad:
    """A step that made no update."""

    line: int
    step: int
    loss: float | None
    gradient_norm: float | None
    reason: str
    decision: Decision


@dataclass(frozen=True)
class Start:
    """The line, as the trainer writes it."""

    step: int
    after: int
    """Lines that the ledger had when the checkpoint was made from which the run goes on; 0: from none."""
    cursor: dict[str, int]
    seed: int
    block_tokens: int
    window_tokens: int
    phases: list[Phase]
    fingerprints: dict[str, str]
    skipped: dict[str, list[str]]
    dp_size: int
    time: float
    passed: dict[str, list[int]] = field(default_factory=dict)
    """Source -> cursor in the checkpoint, and from where the run goes on: what a rollback passes over."""
    rollback: bool = False
    """Whether the process before it went back itself."""


@dataclass
class Attempt:
    """One start of the run and what it made."""

    line: int
    start: Start
    bad: Bad | None = None
    """Of a rollback: the bad step it goes back from, if the line before it tells of one."""
    reached: dict[str, int] = field(default_factory=dict)
    """Of a rollback: the cursor after that step."""
    met: set[tuple[str, str]] = field(default_factory=set)
    """Of a rollback: source and file of the shards left out at that step."""
    counts_until: float = 0
    """Its lines up to this one count, itself among them; 0: the run as it counts does not come from it."""
    made: int = 0
    """Steps it made."""
    thrown_away: list[int] = field(default_factory=list)
    """First and last of its steps that do not count, how many they are and how many tokens they took; or empty."""

    @property
    def counts(self) -> bool:
        """Whether the run as it counts comes from it."""
        return self.counts_until > 0

    @property
    def step(self) -> int:
        return self.start.step

    @property
    def fixed(self) -> dict[str, int]:
        return {name: getattr(self.start, name) for name in FIXED}

    @property
    def skips(self) -> list[tuple[str, str]]:
        """Source and shard of what it leaves out from its first step on."""
        return [(source, file) for source, files in self.start.skipped.items() for file in files]

    @cached_property
    def spans(self) -> list[tuple[Phase, int, int]]:
        """The phases, each with its first step and the one after its last, counted from 0."""
        found, first = [], 0
        for phase in self.start.phases:
            found.append((phase, first, first + phase.steps))
            first += phase.steps
        return found

    def span_of(self, number: int) -> tuple[Phase, int, int] | None:
        """The phase of the `number`-th step."""
        return next((span for span in self.spans if span[1] < number <= span[2]), None)

    def past(self, step: int) -> list[tuple[int, int, dict[str, float], int]]:
        """What its schedule gave each of the first `step` steps: shapes of rows, mixture, and the step each ends with."""
        return [
            (phase.seq_len, phase.rows, phase.mixture, min(end, step))
            for phase, first, end in self.spans
            if first < min(end, step)
        ]

    def throw_away(self, step: Step) -> None:
        tokens = sum(after - before for before, after in step.taken.values())
        first, _, count, sum_tokens = self.thrown_away or [step.number, 0, 0, 0]
        self.thrown_away = [first, step.number, count + 1, sum_tokens + tokens]


Record = Attempt | Skip | Step | Bad


def record(number: int, line: bytes) -> Record | None:
    """The `number`-th line; None for one that no trainer writes."""
    try:
        tree = orjson.loads(line)
        return READERS[tree.pop("kind")](number, tree)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _step(number: int, tree: dict[str, Any]) -> Step:
    """By hand: `section_from` would take minutes for the steps of a long run."""
    taken = {name: (_whole(before), _whole(after, before)) for name, (before, after) in tree.pop("taken").items()}
    found = Step(number, _whole(tree.pop("step"), 1), taken, _sum(tree.pop("ranges")), _sum(tree.pop("tokens")))
    _check(not tree)
    return found


def _skip(number: int, tree: dict[str, Any]) -> Skip:
    found: Skip = section_from(Skip, tree, "")
    _whole(found.step, 1)
    return found


def _bad(number: int, tree: dict[str, Any]) -> Bad:
    _check("line" not in tree)
    found: Bad = section_from(Bad, tree | {"line": number}, "")
    _whole(found.step, 1)
    return found


def _attempt(number: int, tree: dict[str, Any]) -> Attempt:
    start: Start = section_from(Start, tree, "")
    for value in (start.step, start.after, start.block_tokens, start.window_tokens, *start.cursor.values()):
        _whole(value)
    for ends in start.passed.values():
        _check(len(ends) == 2)
        _whole(ends[1], _whole(ends[0]))
    _whole(start.dp_size, 1)
    for phase in start.phases:
        for value in (phase.tokens, phase.seq_len, phase.rows):
            _whole(value, 1)
        shares = phase.mixture.values()
        _check(phase.rows < MOST_ROWS and all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6)
    _whole(sum(phase.tokens for phase in start.phases))
    return Attempt(number, start)


READERS: dict[str, Any] = {"step": _step, "skip": _skip, "start": _attempt, "bad": _bad}


def _whole(value: Any, least: int = 0) -> int:
    _check(type(value) is int and least <= value < MOST)
    return int(value)


def _sum(value: Any) -> int:
    """A sum of hashes, from its hexadecimal."""
    _check(len(value) == 16)
    return int.from_bytes(bytes.fromhex(value), "big")


def _check(right: bool) -> None:
    if not right:
        raise ValueError("no trainer writes this")
