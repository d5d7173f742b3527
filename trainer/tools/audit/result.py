"""The result of an audit: findings, notes and the totals of each source."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_FINDINGS = 1_000
"""Findings kept in memory; further ones are only counted."""


@dataclass(frozen=True)
class Finding:
    """One error in the ledger, or in what the run read."""

    kind: str
    """lost, repeated or swapped: this happened to tokens. unlike: a step read other tokens than its cursors give. changed: a
    setting that must stay the same has changed. ledger: a line is missing, duplicated or unreadable.
    """
    message: str
    step: int | None = None
    source: str | None = None
    rows: Sequence[tuple[int, int]] = ()
    """Step and index (from 0) of each row concerned."""
    shard_ranges: Sequence[str] = ()
    """FILE:FIRST+TOKENS in the manifest's training split."""
    lost_tokens: int = 0
    repeated_tokens: int = 0


@dataclass
class SourceResult:
    """One source at the end of the ledger."""

    epoch_tokens: int
    tokens: int = 0
    """Tokens read by the steps that count."""
    cursor: int = 0
    next_token: str = ""
    """The next token to be read, as FILE:FIRST."""
    skipped_shard_tokens: dict[str, int] = field(default_factory=dict)
    """Skipped shard -> number of its tokens that the run passed over."""
    rollback_tokens: int = 0
    """Tokens that rollbacks passed over. Only discarded steps have read them."""
    rollback_ranges: list[str] = field(default_factory=list)
    """The first few ranges of these tokens in each rollback, as FILE:FIRST+TOKENS."""
    lost_tokens: int = 0
    repeated_tokens: int = 0


@dataclass
class AuditResult:
    sources: dict[str, SourceResult]
    tokens_checked: bool
    """Whether the shards were read again."""
    num_steps: int = 0
    """The last step. If there are no findings, the run made each step up to this one once."""
    num_skipped_updates: int = 0
    """Steps that read their rows but made no update, because the guard decided so."""
    findings: list[Finding] = field(default_factory=list)
    num_findings: int = 0
    notes: list[str] = field(default_factory=list)
    """Restarts, rollbacks, skipped updates, changes of dp size, phase, mixture and sources."""

    @property
    def proven(self) -> bool:
        return self.num_findings == 0

    def report(
        self, kind: str, step: int | None, source: str | None, message: str, names: list[str] | None = None, **more: Any
    ) -> None:
        """Add a finding. The message ends with the names of the ranges, if any are given."""
        if names is not None:
            message += f": {format_shard_ranges(names)}"
        self.add_finding(Finding(kind, message, step, source, shard_ranges=names or (), **more))

    def add_finding(self, finding: Finding) -> None:
        """Add a finding. If each of two rows read the tokens of the other, replace their findings by one finding of a swap."""
        pairs = [old for old in self.findings[-8:] if old.kind == finding.kind == "repeated" and len(old.rows) == 2]
        if half := next((old for old in pairs if [*old.rows] == [*reversed(finding.rows)]), None):
            self._add_to_totals(half, -1)
            self.findings.remove(half)
            message, ranges = f"{half.message}, and vice versa", [*half.shard_ranges, *finding.shard_ranges]
            finding = Finding("swapped", message, half.step, half.source, half.rows, ranges)
        self._add_to_totals(finding, 1)
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)

    def _add_to_totals(self, finding: Finding, sign: int) -> None:
        self.num_findings += sign
        if finding.source in self.sources:
            self.sources[finding.source].lost_tokens += sign * finding.lost_tokens
            self.sources[finding.source].repeated_tokens += sign * finding.repeated_tokens


def format_missing_steps(steps: range) -> str:
    subject = f"step {steps[0]} is" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]} are"
    return f"{subject} not in the ledger"


def format_shard_ranges(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
