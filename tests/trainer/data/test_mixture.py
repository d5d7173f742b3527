from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from tandem.trainer.config import LinearLRConfig, PhaseConfig, ScheduleConfig
from tandem.trainer.data.mixture import cursor_at, row_sources, rows_by_source

MIXTURES = [
    {"a": 1.0},
    {"a": 0.5, "b": 0.5},
    {"a": 0.7, "b": 0.3},
    {"a": 0.999, "b": 0.001},
    {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    {"a": 0.333333, "b": 0.333333, "c": 0.333334},
    {"a": 0.62, "b": 0.25, "c": 0.1, "d": 0.02, "e": 0.01, "unused": 0.0},
    {"a": 0.5, "b": 0.0003, "c": 0.4997},
]


def phase(mixture, *, steps=10, rows=4, seq_len=8, name="p"):
    return PhaseConfig(name, steps * rows * seq_len, seq_len, rows, 1, mixture)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_every_source_has_its_share_to_within_one_row_after_any_number_of_rows(mixture):
    sources = row_sources(phase(mixture), 0, 20_000)
    assert set(sources) <= {name for name, share in mixture.items() if share > 0}
    for name, share in mixture.items():
        count = np.cumsum([source == name for source in sources])
        assert np.abs(count - share * np.arange(1, len(sources) + 1)).max() < 1, name


@pytest.mark.parametrize("mixture", MIXTURES[1:4], ids=str)
def test_two_sources_are_within_one_row_over_any_window(mixture):
    count = np.cumsum([0, *(source == "a" for source in row_sources(phase(mixture), 0, 2_000))])
    for length in range(1, 1_000):
        windows = count[length:] - count[:-length]
        # Shares are floats, so rounding may exceed the bound of one row in the last bits.
        assert np.abs(windows - mixture["a"] * length).max() < 1 + 1e-9


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 12])
def test_more_sources_are_within_two_rows_less_a_share_over_any_window_of_steps(mixture, rows):
    """No prefix is off by more than 1 - 1 / (2n - 2) of a row, so no window is off by more than twice that."""
    shares = {name: share for name, share in mixture.items() if share}
    bound = 2 - 1 / max(len(shares) - 1, 1) if len(shares) > 1 else 0
    sources = row_sources(phase(mixture), 0, rows * 1_000)
    for name, share in shares.items():
        taken = np.cumsum([0, *(source == name for source in sources)])[::rows]
        errors = taken - share * rows * np.arange(len(taken))
        assert errors.max() - errors.min() <= bound + 1e-2, name  # shares are rounded to hundred-thousandths


def test_where_each_share_of_a_step_is_whole_every_step_is_exact():
    sources = row_sources(phase({"a": 0.5, "b": 0.25, "c": 0.25}), 0, 8 * 500)
    for first in range(0, len(sources), 8):
        assert Counter(sources[first : first + 8]) == {"a": 4, "b": 2, "c": 2}


def longest_within_one_row(shares, rows, num_steps):
    """Return the most steps of `rows` rows, up to `num_steps`, for which an order keeps every window within one row.

    This tries all orders.
    """
    steps = [counts for counts in product(range(rows + 1), repeat=len(shares)) if sum(counts) == rows]

    def filled(step, errors, least, most):
        if step == num_steps:
            return step
        reached = step
        for counts in steps:
            now = [error + count - share * rows for error, count, share in zip(errors, counts, shares, strict=True)]
            low, high = list(map(min, least, now)), list(map(max, most, now))
            # The error of a window is the difference between the errors of two prefixes.
            if all(up - down <= 1 for down, up in zip(low, high, strict=True)):
                reached = max(reached, filled(step + 1, now, low, high))
                if reached == num_steps:
                    break
        return reached

    nothing = [Fraction(0)] * len(shares)
    return filled(0, nothing, nothing, nothing)


def test_no_order_of_rows_at_all_keeps_three_sources_within_one_row_over_every_window_of_steps():
    """With more than two sources the bound is not one row: for these shares, no order achieves it over ten steps of 1 or 12."""
    shares = [Fraction(6, 11), Fraction(3, 11), Fraction(2, 11)]
    assert longest_within_one_row(shares, 1, 12) == 9
    assert longest_within_one_row(shares, 12, 12) == 9
    assert longest_within_one_row([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)], 1, 12) == 12, "others can be kept"


@pytest.mark.parametrize("mixture", MIXTURES[1:], ids=str)
def test_rows_do_not_depend_on_the_order_in_which_a_mixture_names_its_sources(mixture):
    """A resume compares the content of mixtures, not the order in which they are written."""
    rows = row_sources(phase(mixture), 0, 300)
    assert row_sources(phase(dict(reversed(mixture.items()))), 0, 300) == rows
    one, other = (rows_by_source(phase(each), 3, 1, 3) for each in (mixture, dict(reversed(mixture.items()))))
    assert str(one) == str(other)


def test_a_window_may_begin_anywhere():
    mixed = phase(MIXTURES[6])
    whole = row_sources(mixed, 0, 500)
    assert [row_sources(mixed, first, 7) for first in range(0, 490, 7)] == [
        whole[first : first + 7] for first in range(0, 490, 7)
    ]


def test_the_cursor_of_a_step_is_what_the_steps_before_took():
    phases = [
        phase(MIXTURES[6], steps=9, name="one"),
        phase({"b": 0.4, "z": 0.6}, rows=3, seq_len=16, name="two"),
    ]
    schedule = ScheduleConfig(None, phases, LinearLRConfig("linear", 1.0, 0.0, 1, None))
    taken = Counter()
    step = 0
    for each in phases:
        for number in range(each.num_steps):
            assert cursor_at(schedule, step) == taken
            for source in row_sources(each, number * each.global_batch_size, each.global_batch_size):
                taken[source] += each.seq_len
            step += 1
    assert sum(cursor_at(schedule, step).values()) == sum(each.tokens for each in phases)
