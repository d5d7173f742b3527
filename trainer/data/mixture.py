"""Which source each row of a phase comes from, and how far each source has been read after any step.

The rows of a phase follow a fixed, repeating pattern. After any number of rows from the start of the phase, each source is
within one row of its share. A window of rows or steps therefore misses its shares by less than one row with two sources, and by
less than two rows with three or more. (With three or more, no order keeps every window within one row in general.) If every
share of a step is a whole number of rows, windows of steps are exact. Nothing here touches a file or torch.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tandem.trainer.config import PhaseConfig, ScheduleConfig

MAX_PATTERN_ROWS = 100_000
"""If the shares need a longer pattern, they are rounded to hundred-thousandths."""


class SourceRows(NamedTuple):
    """The rows of a step that come from one source."""

    source: str
    num_rows: int
    """Number of rows in the whole step."""
    num_rows_before: int
    """Number of them before the requested rows."""
    row_indices: np.ndarray
    """Indices of this source's rows among the requested rows."""


def row_sources(phase: PhaseConfig, first_row: int, num_rows: int) -> list[str]:
    """Return the source of each row in [first_row, first_row + num_rows), counted from the phase's first row."""
    names, pattern = _source_pattern(tuple(phase.mixture.items()))
    # Not `take(mode="wrap")`, whose time grows with first_row / len(pattern).
    return [names[index] for index in pattern[np.arange(first_row, first_row + num_rows) % len(pattern)].tolist()]


def rows_by_source(phase: PhaseConfig, step: int, start_row: int, stop_row: int) -> list[SourceRows]:
    """Return the rows of each source in step `step` of the phase, with their places in rows [start_row, stop_row)."""
    mixture = tuple(phase.mixture.items())
    first = step * phase.global_batch_size % len(_source_pattern(mixture)[1])
    return _rows_by_source(mixture, first, phase.global_batch_size, start_row, stop_row)


def cursor_at(schedule: ScheduleConfig, step: int) -> dict[str, int]:
    """Return the tokens that a run from step 0 takes from each source before global step `step`."""
    cursor: dict[str, int] = {}
    for phase in schedule.phases:
        steps = min(step, phase.num_steps)
        names, pattern = _source_pattern(tuple(phase.mixture.items()))
        periods, rest = divmod(steps * phase.global_batch_size, len(pattern))
        rows = periods * np.bincount(pattern, minlength=len(names)) + np.bincount(pattern[:rest], minlength=len(names))
        for name, count in zip(names, rows, strict=True):
            if count:
                cursor[name] = cursor.get(name, 0) + int(count) * phase.seq_len
        step -= steps
    return cursor


@lru_cache(maxsize=1024)
def _rows_by_source(
    mixture: tuple[tuple[str, float], ...], first_row: int, num_rows: int, start_row: int, stop_row: int
) -> list[SourceRows]:
    names, pattern = _source_pattern(mixture)
    indices = pattern.take(range(first_row, first_row + num_rows), mode="wrap")
    return [
        SourceRows(name, int(rows.sum()), int(rows[:start_row].sum()), np.flatnonzero(rows[start_row:stop_row]))
        for name, rows in ((name, indices == index) for index, name in enumerate(names))
        if rows.any()
    ]


@lru_cache(maxsize=64)
def _source_pattern(mixture: tuple[tuple[str, float], ...]) -> tuple[list[str], np.ndarray]:
    """Return the sorted source names and one period of indices into them.

    The next row comes from the source that needs one soonest, among those that are behind by at least 1 / (2n - 2) of a row.
    This keeps each of the n sources within one row of its share.
    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    names = sorted(name for name, share in mixture if share > 0)
    rows_per_period = _rows_per_period([dict(mixture)[name] for name in names])
    period_rows, slack = sum(rows_per_period), max(2 * len(names) - 2, 1)
    num_rows_given = [0] * len(names)
    pattern = np.zeros(period_rows, np.int16)
    for row in range(period_rows):
        rows_until_needed = {}
        for index, (quota, given) in enumerate(zip(rows_per_period, num_rows_given, strict=True)):
            deficit = quota * (row + 1) - period_rows * given
            if deficit * slack >= period_rows:
                rows_until_needed[index] = (period_rows - period_rows / slack - deficit) / quota
        next_index = min(rows_until_needed, key=rows_until_needed.__getitem__)
        pattern[row] = next_index
        num_rows_given[next_index] += 1
    return names, pattern


def _rows_per_period(shares: list[float]) -> list[int]:
    """Return the rows of each source in the shortest period that represents the shares."""
    ratios = [Fraction(share).limit_denominator(MAX_PATTERN_ROWS) for share in shares]
    period = math.lcm(*(ratio.denominator for ratio in ratios))
    quotas = [int(ratio * period) for ratio in ratios]
    if period > MAX_PATTERN_ROWS or sum(quotas) != period:
        exact = [share / sum(shares) * MAX_PATTERN_ROWS for share in shares]
        quotas = [int(quota) for quota in exact]
        by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - exact[index])
        for index in by_remainder[: MAX_PATTERN_ROWS - sum(quotas)]:
            quotas[index] += 1
    common = math.gcd(*quotas)
    return [quota // common for quota in quotas]
