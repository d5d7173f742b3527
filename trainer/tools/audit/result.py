"""What an audit finds, in words and numbers: what is wrong, what is only worth knowing, where each source stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_FINDINGS = 1_000
"""Kept; further ones are counted, so that what is wrong everywhere fits in memory."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be."""

    kind: str
    """lost, repeated, swapped: of tokens. unlike: what was read is not what the cursors say. changed: what a run keeps for
    life. ledger: lines are missing, there twice or unreadable.
    """
    message: str
    step: int | None = None
    source: str | None = None
    rows: Sequence[tuple[int, int]] = ()
    """Step, and row from 0, of the rows it is about."""
    shard_ranges: Sequence[str] = ()
    """FILE:FIRST+TOKENS in the manifest's training split."""
    lost_tokens: int = 0
    repeated_tokens: int = 0


@dataclass
class SourceResult:
    """One source at the end of the ledger."""

    epoch_tokens: int
    tokens: int = 0
    """Taken by the steps that count."""
    cursor: int = 0
    next_token: str = ""
    """The token that comes next, as FILE:FIRST."""
    skipped_shard_tokens: dict[str, int] = field(default_factory=dict)
    """Shard that is left out -> its tokens that were passed over."""
    rollback_tokens: int = 0
    """Passed over by rollbacks: read for steps that were taken back, and taken by none that counts."""
    rollback_ranges: list[str] = field(default_factory=list)
    """The first few of these of each rollback, as FILE:FIRST+TOKENS."""
    lost_tokens: int = 0
    repeated_tokens: int = 0


@dataclass
class AuditResult:
    sources: dict[str, SourceResult]
    tokens_checked: bool
    """Whether the shards were read again."""
    num_steps: int = 0
    """The last step; without findings each up to it was made once."""
    num_skipped_updates: int = 0
    """Of these: their rows were read, and the guard left the update out."""
    findings: list[Finding] = field(default_factory=list)
    num_findings: int = 0
    notes: list[str] = field(default_factory=list)
    """Restarts, rollbacks, updates left out, changes of dp size, phase, mixture and sources."""

    @property
    def proven(self) -> bool:
        return self.num_findings == 0

    def add_finding(self, finding: Finding) -> None:
        """The finding is on record; one that shows an earlier one to be half of a swap takes its place."""
        swap_half = next((old for old in self.findings[-8:] if is_swap(old, finding)), None)
        if swap_half:
            self._add_to_totals(swap_half, -1)
            self.findings.remove(swap_half)
            finding = Finding(
                "swapped",
                f"{swap_half.message}, and the other way round",
                swap_half.step,
                swap_half.source,
                swap_half.rows,
                [*swap_half.shard_ranges, *finding.shard_ranges],
            )
        self._add_to_totals(finding, 1)
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def _add_to_totals(self, finding: Finding, sign: int) -> None:
        self.num_findings += sign
        if finding.source in self.sources:
            self.sources[finding.source].lost_tokens += sign * finding.lost_tokens
            self.sources[finding.source].repeated_tokens += sign * finding.repeated_tokens


def is_swap(one: Finding, other: Finding) -> bool:
    """Whether a row read what another is for, and that one what the first is for."""
    return one.kind == other.kind == "repeated" and len(one.rows) == 2 and [*one.rows] == [*reversed(other.rows)]


def format_steps(steps: range) -> str:
    return f"step {steps[0]} is" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]} are"


def format_shard_ranges(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
