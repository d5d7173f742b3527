"""What the checks say: measured numbers beside the interval their law allows, as table, as JSON, as one line for a failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One number that a law allows an interval for."""

    check: str
    """coordinates, transfer or decay."""
    what: str
    """The quantity; one row of the table."""
    case: str
    """Under which conditions; one column of the table."""
    value: float
    low: float
    high: float
    symptom_of: str
    """The rule that is most likely broken where the value lies outside and nothing before it does."""

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high  # false for what is not a number

    def sentence(self) -> str:
        """What is wrong, in one line."""
        allowed = f"allowed {interval(self)}"
        return f"{self.check}: {self.what} ({self.case}) is {self.value:+.3g}; {allowed}; symptom of: {self.symptom_of}"


def first_failure(findings: Iterable[Finding]) -> Finding | None:
    """The failure that names the broken rule best: checks put causes before consequences."""
    return next((finding for finding in findings if not finding.holds), None)


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """Plain data, infinite ends as null."""
    rows = [{**asdict(finding), "holds": finding.holds} for finding in findings]
    return [
        {key: None if value in (inf, -inf) or value != value else value for key, value in row.items()} for row in rows
    ]


def table(findings: list[Finding]) -> str:
    """One row for each quantity, one column for each case; what lies outside is marked."""
    cases = list(dict.fromkeys(finding.case for finding in findings))
    rows: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        rows.setdefault(finding.what, {})[finding.case] = finding
    lines = [["", "allowed", *cases]]
    for what, row in rows.items():
        lines.append([what, interval(next(iter(row.values()))), *(_cell(row.get(case)) for case in cases)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def interval(finding: Finding) -> str:
    """The allowed interval as people read it."""
    if finding.high == inf:
        return f"at least {finding.low:g}"
    return f"{finding.low:+.4g} to {finding.high:+.4g}"


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    return f"{finding.value:+.3g}" if finding.holds else f"{finding.value:+.3g} !"
