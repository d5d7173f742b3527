"""Results of the checks: measured numbers with the intervals that their laws allow, as a table, as JSON or as a message."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """A number and the interval that its law allows."""

    check: str
    """coordinates, transfer or decay."""
    quantity: str
    """The measured quantity: a row of the table."""
    case: str
    """The conditions: a column of the table."""
    value: float
    low: float
    high: float
    likely_cause: str
    """The rule that is most likely broken if this is the first value outside its interval."""

    @property
    def is_within_bounds(self) -> bool:
        return self.low <= self.value <= self.high  # false for NaN

    @property
    def interval(self) -> str:
        return f"at least {self.low:g}" if self.high == inf else f"{self.low:+.4g} to {self.high:+.4g}"

    def failure_message(self) -> str:
        """Describe the failure in one line."""
        measured = f"{self.check}: {self.quantity} ({self.case}) is {self.value:+.3g}"
        return f"{measured}; allowed: {self.interval}; likely cause: {self.likely_cause}"


def first_failure(measurements: Iterable[Measurement]) -> Measurement | None:
    """Return the failure that best identifies the broken rule: checks list causes before consequences."""
    return next((measurement for measurement in measurements if not measurement.is_within_bounds), None)


def measurements_to_json(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Return plain data with null for infinity and NaN."""
    rows = [asdict(measurement) | {"is_within_bounds": measurement.is_within_bounds} for measurement in measurements]
    for row in rows:
        row |= {key: value if isfinite(value) else None for key, value in row.items() if isinstance(value, float)}
    return rows


def format_table(measurements: list[Measurement]) -> str:
    """Format one row per quantity and one column per case; `!` marks a value outside its interval."""
    cases = list(dict.fromkeys(measurement.case for measurement in measurements))
    by_quantity: dict[str, dict[str, Measurement]] = {}
    for measurement in measurements:
        by_quantity.setdefault(measurement.quantity, {})[measurement.case] = measurement
    lines = [["", "allowed", *cases]]
    for quantity, by_case in by_quantity.items():
        marked = {case: f"{found.value:+.3g}" + " !" * (not found.is_within_bounds) for case, found in by_case.items()}
        lines.append([quantity, next(iter(by_case.values())).interval, *(marked.get(case, "") for case in cases)])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines)
