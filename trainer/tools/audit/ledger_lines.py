"""Parse the lines of a ledger. A line with keys, types or sizes that the trainer does not write counts as unreadable, so the
other modules need not check values.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
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
    line_number: int
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
    """A start, as the trainer writes it."""

    step: int
    num_ledger_lines: int
    """Lines of the ledger when the checkpoint was saved from which the run continues; 0: no checkpoint."""
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
    """Source -> cursor in the checkpoint and cursor from which the run continues. A rollback skips the tokens between them."""
    is_rollback: bool = False
    """Whether the process rolled back. If not, it was just started."""


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
    """Last of its lines that counts, or 0 if a later start discarded all of them."""
    discarded_steps: list[int] = field(default_factory=list)
    """First and last of its steps that do not count, their number, and the tokens they read; empty if all steps count."""

    @property
    def is_effective(self) -> bool:
        """Whether the start counts, because no later start discarded it."""
        return self.last_effective_line > 0

    @property
    def step(self) -> int:
        return self.start.step

    @property
    def skipped_shards(self) -> list[tuple[str, str]]:
        """Source and file of each shard that is skipped from its first step on."""
        return [(source, file) for source, files in self.start.skipped_shards.items() for file in files]

    @cached_property
    def phase_spans(self) -> list[tuple[PhaseConfig, int, int]]:
        """Each phase with its first step and the step after its last, counted from 0."""
        ends = accumulate(phase.num_steps for phase in self.start.phases)
        return [(phase, end - phase.num_steps, end) for phase, end in zip(self.start.phases, ends, strict=True)]

    def phase_span_at(self, step: int) -> tuple[PhaseConfig, int, int] | None:
        """Return the span of the phase that contains a step counted from 1."""
        return next((span for span in self.phase_spans if span[1] < step <= span[2]), None)

    def schedule_before(self, step: int) -> list[tuple[int, int, dict[str, float], int]]:
        """Return seq_len, batch size, mixture and last step of each phase of the first `step` steps."""
        return [
            (phase.seq_len, phase.global_batch_size, phase.mixture, min(end, step))
            for phase, first, end in self.phase_spans
            if first < min(end, step)
        ]

    def discard_step(self, step: StepLine) -> None:
        first, _, num_steps, num_tokens = self.discarded_steps or [step.step, 0, 0, 0]
        num_tokens += sum(after - before for before, after in step.read_ranges.values())
        self.discarded_steps = [first, step.step, num_steps + 1, num_tokens]


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
    _check(tree.keys() == {"step", "read_ranges", "ranges_digest", "tokens_digest"})
    read_ranges = {name: (before, after) for name, (before, after) in tree["read_ranges"].items()}
    for before, after in read_ranges.values():
        _check_integers(0, before)
        _check_integers(before, after)
    _check_integers(1, tree["step"])
    ranges_digest, tokens_digest = tree["ranges_digest"], tree["tokens_digest"]
    _check(len(ranges_digest) == len(tokens_digest) == 16)
    digests = (int.from_bytes(bytes.fromhex(digest)) for digest in (ranges_digest, tokens_digest))
    return StepLine(line_number, tree["step"], read_ranges, *digests)


def _parse_dataclass(line_type: Any, line_number: int, tree: dict[str, Any]) -> Any:
    _check("line_number" not in tree)
    found = parse_dataclass(line_type, tree | {"line_number": line_number}, "")
    _check_integers(1, found.step)
    return found


def _parse_start(line_number: int, tree: dict[str, Any]) -> Attempt:
    start: StartLine = parse_dataclass(StartLine, tree, "")
    sizes = start.shuffle_block_tokens, start.shuffle_window_tokens
    _check_integers(0, start.step, start.num_ledger_lines, *sizes, *start.cursor.values())
    _check_integers(1, start.dp_size)
    for left, end in start.skipped_ranges.values():
        _check_integers(0, left)
        _check_integers(left, end)
    for phase in start.phases:
        _check_integers(1, phase.tokens, phase.seq_len, phase.global_batch_size)
        shares = phase.mixture.values()
        _check(phase.global_batch_size < MAX_ROWS_PER_STEP)
        _check(all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6)
    _check_integers(0, sum(phase.tokens for phase in start.phases))
    return Attempt(line_number, start)


PARSERS: dict[str, Any] = {
    "step": _parse_step, "start": _parse_start, "skip": partial(_parse_dataclass, SkipLine),
    "bad": partial(_parse_dataclass, BadStepLine),
}  # fmt: skip


def _check_integers(minimum: int, *values: Any) -> None:
    for value in values:
        _check(type(value) is int and minimum <= value < MAX_VALUE)


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError("not written by the trainer")
