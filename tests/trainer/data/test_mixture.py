from collections import Counter

import numpy as np
import pytest

from trainer.config import Linear, Phase, Schedule
from trainer.data.mixture import cursor_at, row_sources

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
    return Phase(name, steps * rows * seq_len, seq_len, rows, 1, mixture)


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
        # Counts are whole, the share is a float: the bound of one row may be missed by the float's last bits.
        assert np.abs(windows - mixture["a"] * length).max() < 1 + 1e-9


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
    schedule = Schedule(None, phases, Linear("linear", 1.0, 0.0, 1, None))
    taken = Counter()
    step = 0
    for each in phases:
        for number in range(each.steps):
            assert {name: count for name, count in cursor_at(schedule, step).items() if count} == taken
            for source in row_sources(each, number * each.rows, each.rows):
                taken[source] += each.seq_len
            step += 1
    assert sum(cursor_at(schedule, step).values()) == sum(each.tokens for each in phases)
