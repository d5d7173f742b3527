"""What the checks say: measured numbers beside the interval their law allows, as table, as JSON, as one line for a failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One number that a law allows an interval for."""

    check: str
    """coordinates, transfer or decay."""
    quantity: str
    """The quantity; one row of the table."""
    case: str
    """Under which conditions; one column of the table."""
    value: float
    low: float
    high: float
    likely_cause: str
    """The rule that is most likely broken where the value lies outside and nothing before it does."""

    @property
    def is_within_bounds(self) -> bool:
        return self.low <= self.value <= self.high  # false for what is not a number

    def failure_message(self) -> str:
        """What is wrong, in one line."""
        allowed = f"allowed {format_interval(self)}"
        return f"{self.check}: {self.quantity} ({self.case}) is {self.value:+.3g}; {allowed}; symptom of: {self.likely_cause}"


def first_failure(measurements: Iterable[Measurement]) -> Measurement | None:
    """The failure that names the broken rule best: checks put causes before consequences."""
    return next((finding for finding in measurements if not finding.is_within_bounds), None)


def measurements_to_json(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Plain data, infinite ends as null."""
    rows = [{**asdict(finding), "is_within_bounds": finding.is_within_bounds} for finding in measurements]
    return [
        {key: None if value in (inf, -inf) or value != value else value for key, value in row.items()} for row in rows
    ]


def format_table(measurements: list[Measurement]) -> str:
    """One row for each quantity, one column for each case; what lies outside is marked."""
    cases = list(dict.fromkeys(finding.case for finding in measurements))
    rows: dict[str, dict[str, Measurement]] = {}
    for finding in measurements:
        rows.setdefault(finding.quantity, {})[finding.case] = finding
    lines = [["", "allowed", *cases]]
    for what, row in rows.items():
        lines.append(
            [what, format_interval(next(iter(row.values()))), *(_format_cell(row.get(case)) for case in cases)]
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def format_interval(measurement: Measurement) -> str:
    """The allowed interval as people read it."""
    if measurement.high == inf:
        return f"at least {measurement.low:g}"
    return f"{measurement.low:+.4g} to {measurement.high:+.4g}"


def _format_cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    return f"{measurement.value:+.3g}" if measurement.is_within_bounds else f"{measurement.value:+.3g} !"
