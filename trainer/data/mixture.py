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

from tandem.trainer.config import Phase, Schedule

LARGEST_PERIOD = 100_000
"""Shares that need a longer pattern are rounded to hundred-thousandths."""


class Portion(NamedTuple):
    """What a step takes from one source."""

    source: str
    rows: int
    """Rows of the whole step."""
    before: int
    """Those of them that stand before the rows asked for."""
    mine: np.ndarray
    """Where this source's rows stand among the rows asked for."""


def row_sources(phase: Phase, first: int, count: int) -> list[str]:
    """The source of each of rows [first, first + count) of the phase, counted from the phase's first row."""
    names, pattern = _pattern(tuple(phase.mixture.items()))
    # Not take's mode wrap, which counts down by the length of the pattern.
    return [names[index] for index in pattern[np.arange(first, first + count) % len(pattern)].tolist()]


def portions(phase: Phase, step: int, start: int, stop: int) -> list[Portion]:
    """What the phase's step number `step` takes from each source, and which of its rows [start, stop) they are."""
    mixture = tuple(phase.mixture.items())
    first = step * phase.rows % len(_pattern(mixture)[1])
    return _portions(mixture, first, phase.rows, start, stop)


def cursor_at(schedule: Schedule, step: int) -> dict[str, int]:
    """Tokens taken from each source before global step `step` by a run that began at step 0."""
    cursor: dict[str, int] = {}
    for phase in schedule.phases:
        steps = min(step, phase.steps)
        names, pattern = _pattern(tuple(phase.mixture.items()))
        periods, rest = divmod(steps * phase.rows, len(pattern))
        rows = periods * np.bincount(pattern, minlength=len(names)) + np.bincount(pattern[:rest], minlength=len(names))
        for name, count in zip(names, rows, strict=True):
            if count:
                cursor[name] = cursor.get(name, 0) + int(count) * phase.seq_len
        step -= steps
    return cursor


@lru_cache(maxsize=1024)
def _portions(mixture: tuple[tuple[str, float], ...], first: int, count: int, start: int, stop: int) -> list[Portion]:
    names, pattern = _pattern(mixture)
    rows = pattern.take(range(first, first + count), mode="wrap")
    of_sources = [(name, rows == index) for index, name in enumerate(names)]
    return [
        Portion(name, int(rows.sum()), int(rows[:start].sum()), np.flatnonzero(rows[start:stop]))
        for name, rows in of_sources
        if rows.any()
    ]


@lru_cache(maxsize=64)
def _pattern(mixture: tuple[tuple[str, float], ...]) -> tuple[list[str], np.ndarray]:
    """Source names and one period of indices into them, whatever the order in which the mixture names them.

    Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): of the sources that
    are due by at least 1 / (2n - 2) of a row, the one that must come soonest; no source then strays by a
    whole row.
    """
    names = sorted(name for name, share in mixture if share > 0)
    quotas = _quotas([dict(mixture)[name] for name in names])
    period, slack = sum(quotas), max(2 * len(names) - 2, 1)
    given = [0] * len(names)
    pattern = np.zeros(period, np.int16)
    for row in range(period):
        due = [quota * (row + 1) - period * done for quota, done in zip(quotas, given, strict=True)]
        waiting = [index for index in range(len(names)) if due[index] * slack >= period]
        chosen = min(waiting, key=lambda index: (period - period / slack - due[index]) / quotas[index])
        pattern[row] = chosen
        given[chosen] += 1
    return names, pattern


def _quotas(shares: list[float]) -> list[int]:
    """Rows of each source in one period, the shortest period that keeps the shares."""
    ratios = [Fraction(share).limit_denominator(LARGEST_PERIOD) for share in shares]
    period = math.lcm(*(ratio.denominator for ratio in ratios))
    quotas = [int(ratio * period) for ratio in ratios]
    if period > LARGEST_PERIOD or sum(quotas) != period:
        exact = [share / sum(shares) * LARGEST_PERIOD for share in shares]
        quotas = [int(quota) for quota in exact]
        by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - exact[index])
        for index in by_remainder[: LARGEST_PERIOD - sum(quotas)]:
            quotas[index] += 1
    common = math.gcd(*quotas)
    return [quota // common for quota in quotas]
