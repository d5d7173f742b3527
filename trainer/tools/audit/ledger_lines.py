"""Parse the lines of a ledger. A line with keys, types or sizes that the trainer does not write is unreadable, so the other
modules need not check values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import orjson

from tandem.trainer.config import PhaseConfig, parse_dataclass
from tandem.trainer.data.ledger import BadStepAction

IMMUTABLE_SETTINGS = ("seed", "shuffle_block_tokens", "shuffle_window_tokens")
"""Settings of a start that no later start may change."""
MAX_VALUE = 1 << 60
"""Upper bound for numbers in a ledger: sums of a few of them still fit into 64 bits."""
MAX_ROWS_PER_STEP = 1 << 20
"""Upper bound for the rows of a step: lists of them still fit into memory."""


class StepLine(NamedTuple):
    line_number: int
    step: int
    """The step, from 1."""
    read_ranges: dict[str, tuple[int, int]]
    """Source -> cursor before and after."""
    ranges_digest: int
    tokens_digest: int


@dataclass(frozen=True)
class SkipLine:
    step: int
    source: str
    shard: str


@dataclass(frozen=True)
class BadStepLine:
    """A step whose update was skipped."""

    line_number: int
    step: int
    loss: float | None
    grad_norm: float | None
    reason: str
    action: BadStepAction


@dataclass(frozen=True)
class StartLine:
    """The fields of a start, as the trainer writes them."""

    step: int
    num_ledger_lines: int
    """Lines that the ledger had when the checkpoint was made from which the run continues; 0: no checkpoint."""
    cursor: dict[str, int]
    seed: int
    shuffle_block_tokens: int
    shuffle_window_tokens: int
    phases: list[PhaseConfig]
    fingerprints: dict[str, str]
    skipped_shards: dict[str, list[str]]
    dp_size: int
    time: float
    skipped_ranges: dict[str, list[int]] = field(default_factory=dict)
    """Source -> cursor in the checkpoint and cursor from which the run continues: a rollback passes over the tokens between."""
    is_rollback: bool = False
    """Whether the process rolled back, instead of having just been started."""


@dataclass
class Attempt:
    """One start of the run and its steps."""

    line_number: int
    start: StartLine
    bad_step: BadStepLine | None = None
    """For a rollback: the bad step on the line before it, if there is one."""
    bad_step_cursor: dict[str, int] = field(default_factory=dict)
    """For a rollback: the cursor after that step."""
    bad_step_skipped_shards: set[tuple[str, str]] = field(default_factory=set)
    """For a rollback: source and file of the shards skipped at that step."""
    last_effective_line: float = 0
    """Its lines up to this one count, the start included; 0: a later start discarded all of them."""
    num_steps: int = 0
    discarded_steps: list[int] = field(default_factory=list)
    """Its steps that do not count: first, last, how many they are and how many tokens they read; or empty."""

    @property
    def is_effective(self) -> bool:
        """Whether no later start discarded it."""
        return self.last_effective_line > 0

    @property
    def step(self) -> int:
        return self.start.step

    @property
    def immutable_settings(self) -> dict[str, int]:
        return {name: getattr(self.start, name) for name in IMMUTABLE_SETTINGS}

    @property
    def skipped_shards(self) -> list[tuple[str, str]]:
        """Source and file of the shards skipped from its first step on."""
        return [(source, file) for source, files in self.start.skipped_shards.items() for file in files]

    @cached_property
    def phase_spans(self) -> list[tuple[PhaseConfig, int, int]]:
        """Each phase with its first step and the step after its last, counted from 0."""
        found, first = [], 0
        for phase in self.start.phases:
            found.append((phase, first, first + phase.num_steps))
            first += phase.num_steps
        return found

    def phase_span_at(self, step: int) -> tuple[PhaseConfig, int, int] | None:
        """Return the phase of a step counted from 1."""
        return next((span for span in self.phase_spans if span[1] < step <= span[2]), None)

    def schedule_before(self, step: int) -> list[tuple[int, int, dict[str, float], int]]:
        """Return seq_len, batch size, mixture and last step of each phase of the first `step` steps."""
        return [
            (phase.seq_len, phase.global_batch_size, phase.mixture, min(end, step))
            for phase, first, end in self.phase_spans
            if first < min(end, step)
        ]

    def discard_step(self, step: StepLine) -> None:
        tokens = sum(after - before for before, after in step.read_ranges.values())
        first, _, count, sum_tokens = self.discarded_steps or [step.step, 0, 0, 0]
        self.discarded_steps = [first, step.step, count + 1, sum_tokens + tokens]


LedgerLine = Attempt | SkipLine | StepLine | BadStepLine


def parse_line(line_number: int, line: bytes) -> LedgerLine | None:
    """Parse one line. Return None if the trainer does not write such a line."""
    try:
        tree = orjson.loads(line)
        return PARSERS[tree.pop("kind")](line_number, tree)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse_step(line_number: int, tree: dict[str, Any]) -> StepLine:
    """Parse by hand: `parse_dataclass` would take minutes for the steps of a long run."""
    ends = tree.pop("read_ranges").items()
    read_ranges = {name: (_parse_integer(before), _parse_integer(after, before)) for name, (before, after) in ends}
    step, digests = (
        _parse_integer(tree.pop("step"), 1),
        [_parse_digest(tree.pop(f"{of}_digest")) for of in ("ranges", "tokens")],
    )
    _check(not tree)
    return StepLine(line_number, step, read_ranges, *digests)


def _parse_skip(line_number: int, tree: dict[str, Any]) -> SkipLine:
    found: SkipLine = parse_dataclass(SkipLine, tree, "")
    _parse_integer(found.step, 1)
    return found


def _parse_bad_step(line_number: int, tree: dict[str, Any]) -> BadStepLine:
    _check("line_number" not in tree)
    found: BadStepLine = parse_dataclass(BadStepLine, tree | {"line_number": line_number}, "")
    _parse_integer(found.step, 1)
    return found


def _parse_start(line_number: int, tree: dict[str, Any]) -> Attempt:
    start: StartLine = parse_dataclass(StartLine, tree, "")
    block_sizes = (start.shuffle_block_tokens, start.shuffle_window_tokens)
    for value in (start.step, start.num_ledger_lines, *block_sizes, *start.cursor.values()):
        _parse_integer(value)
    for ends in start.skipped_ranges.values():
        _check(len(ends) == 2)
        _parse_integer(ends[1], _parse_integer(ends[0]))
    _parse_integer(start.dp_size, 1)
    for phase in start.phases:
        for value in (phase.tokens, phase.seq_len, phase.global_batch_size):
            _parse_integer(value, 1)
        shares = phase.mixture.values()
        _check(phase.global_batch_size < MAX_ROWS_PER_STEP)
        _check(all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6)
    _parse_integer(sum(phase.tokens for phase in start.phases))
    return Attempt(line_number, start)


PARSERS: dict[str, Any] = {"step": _parse_step, "skip": _parse_skip, "start": _parse_start, "bad": _parse_bad_step}


def _parse_integer(value: Any, minimum: int = 0) -> int:
    _check(type(value) is int and minimum <= value < MAX_VALUE)
    return int(value)


def _parse_digest(value: Any) -> int:
    """Parse a hexadecimal sum of hashes."""
    _check(len(value) == 16)
    return int.from_bytes(bytes.fromhex(value), "big")


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError("not written by the trainer")
