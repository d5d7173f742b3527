"""Which source each row of a phase comes from, and how far each source has been read after any step of the
schedule.

The one idea: the rows of a phase follow a fixed repeating pattern in which, after any number of rows, every source has had
its share to within less than one row. A window of rows or steps anywhere is then off by less than one row for two sources,
and by less than two for more, where no order of rows stays within one in general, however freely steps are filled; where
every share of a step is a whole number of rows, windows of steps are exact. Nothing here touches a file or torch.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tandem.trainer.config import PhaseConfig, ScheduleConfig

MAX_PATTERN_ROWS = 100_000
"""Shares that need a longer pattern are rounded to hundred-thousandths."""


class SourceRows(NamedTuple):
    """What a step takes from one source."""

    source: str
    num_rows: int
    """Rows of the whole step."""
    num_rows_before: int
    """Those of them that stand before the rows asked for."""
    row_indices: np.ndarray
    """Where this source's rows stand among the rows asked for."""


def row_sources(phase: PhaseConfig, first_row: int, num_rows: int) -> list[str]:
    """The source of each of rows [first, first + count) of the phase, counted from the phase's first row."""
    names, pattern = _source_pattern(tuple(phase.mixture.items()))
    # Not take's mode wrap, which counts down by the length of the pattern.
    return [names[index] for index in pattern[np.arange(first_row, first_row + num_rows) % len(pattern)].tolist()]


def rows_by_source(phase: PhaseConfig, step: int, start_row: int, stop_row: int) -> list[SourceRows]:
    """What the phase's step number `step` takes from each source, and which of its rows [start, stop) they are."""
    mixture = tuple(phase.mixture.items())
    first = step * phase.global_batch_size % len(_source_pattern(mixture)[1])
    return _rows_by_source(mixture, first, phase.global_batch_size, start_row, stop_row)


def cursor_at(schedule: ScheduleConfig, step: int) -> dict[str, int]:
    """Tokens taken from each source before global step `step` by a run that began at step 0."""
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
    rows = pattern.take(range(first_row, first_row + num_rows), mode="wrap")
    source_masks = [(name, rows == index) for index, name in enumerate(names)]
    return [
        SourceRows(name, int(rows.sum()), int(rows[:start_row].sum()), np.flatnonzero(rows[start_row:stop_row]))
        for name, rows in source_masks
        if rows.any()
    ]


@lru_cache(maxsize=64)
def _source_pattern(mixture: tuple[tuple[str, float], ...]) -> tuple[list[str], np.ndarray]:
    """Source names and one period of indices into them, whatever the order in which the mixture names them.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): of the sources that
    are due by at least 1 / (2n - 2) of a row, the one that must come soonest; no source then strays by a
    whole row.
    """
    names = sorted(name for name, share in mixture if share > 0)
    rows_per_period = _rows_per_period([dict(mixture)[name] for name in names])
    period_rows, slack = sum(rows_per_period), max(2 * len(names) - 2, 1)
    num_rows_given = [0] * len(names)
    pattern = np.zeros(period_rows, np.int16)
    for row in range(period_rows):
        row_deficits = [
            quota * (row + 1) - period_rows * num_done
            for quota, num_done in zip(rows_per_period, num_rows_given, strict=True)
        ]
        eligible = [index for index in range(len(names)) if row_deficits[index] * slack >= period_rows]
        source_index = min(
            eligible,
            key=lambda index: (period_rows - period_rows / slack - row_deficits[index]) / rows_per_period[index],
        )
        pattern[row] = source_index
        num_rows_given[source_index] += 1
    return names, pattern


def _rows_per_period(shares: list[float]) -> list[int]:
    """Rows of each source in one period, the shortest period that keeps the shares."""
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
