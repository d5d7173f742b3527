"""The trials of a learning-rate sweep and the conclusions from their losses."""

from math import inf, isnan

import pytest

from tandem.trainer.tools.mup.lr_transfer import (
    MUP,
    WITHOUT_WIDTH_RULES,
    best_lr_spread_octaves,
    build_trials,
    judge,
    tail_mean,
)
from tandem.trainer.tools.mup.measurement import first_failure
from tandem.trainer.tools.mup.plots import draw_transfer
from tests import tiny_configs

GRID = [0.001 * 2**step for step in range(7)]


def valley(best: int) -> dict[float, float]:
    """Losses by learning rate with their minimum at one index of the grid."""
    return {lr: 5.0 + 0.1 * abs(place - best) for place, lr in enumerate(GRID)}


def losses(under_mup: list[int], without: list[int]) -> dict[str, dict[int, dict[float, float]]]:
    widths = [64 * 2**step for step in range(len(under_mup))]
    return {
        MUP: dict(zip(widths, map(valley, under_mup), strict=True)),
        WITHOUT_WIDTH_RULES: dict(zip(widths, map(valley, without), strict=True)),
    }


def test_an_optimum_that_stays_or_moves_one_step_passes():
    assert first_failure(judge(losses([3, 3, 3, 3], [3, 2, 1, 0]))) is None
    assert first_failure(judge(losses([3, 3, 4, 4], [3, 2, 1, 0]))) is None


@pytest.mark.parametrize(
    ("under_mup", "without", "symptom"),
    [
        ([3, 3, 2, 1], [3, 2, 1, 0], "width rules"),
        ([2, 4, 3, 3], [3, 2, 1, 0], "width rules"),
        ([3, 3, 3, 3], [3, 3, 3, 3], "too short or narrow"),
        ([3, 3, 4, 4], [3, 3, 3, 2], "too short or narrow"),
        ([3, 3, 3, 3], [3, 4, 5, 6], "too short or narrow"),
        ([0, 0, 0, 0], [3, 2, 1, 0], "--octaves"),
        ([6, 6, 6, 6], [3, 2, 1, 0], "--octaves"),
    ],
)
def test_a_moving_optimum_an_equal_rival_and_an_optimum_at_the_edge_fail(under_mup, without, symptom):
    failure = first_failure(judge(losses(under_mup, without)))
    assert failure is not None
    assert symptom in failure.failure_message()


def test_a_diverged_run_is_never_the_best():
    assert tail_mean([9.0, 8.0, float("nan")], 4) == inf
    assert tail_mean([9.0, 8.0], 4) == inf
    assert isnan(best_lr_spread_octaves({64: {0.1: inf, 0.2: 3.0}, 128: {0.1: inf, 0.2: inf}}))
    assert best_lr_spread_octaves({64: {0.1: inf, 0.2: 3.0}, 128: {0.1: inf, 0.2: 4.0}}) == 0


def test_a_sweep_in_which_a_width_always_diverged_shows_nothing(tmp_path):
    given = losses([3, 3], [3, 1])
    given[WITHOUT_WIDTH_RULES][128] = dict.fromkeys(GRID, inf)
    failure = first_failure(judge(given))
    assert failure is not None
    assert "too short or narrow" in failure.failure_message()
    nothing = {name: {width: dict.fromkeys(GRID, inf) for width in (64, 128)} for name in (MUP, WITHOUT_WIDTH_RULES)}
    assert draw_transfer(nothing, tmp_path).is_file()


def test_the_loss_is_the_mean_of_the_last_eighth():
    assert tail_mean([9.0] * 14 + [3.0, 5.0], 16) == 4.0


def test_the_parametrisations_are_one_at_the_base_width_and_differ_only_in_base_width_elsewhere():
    config = tiny_configs.make_config("btlm", mup={"base_hidden_size": 64})
    found = {
        (trial.parametrisation, trial.width, trial.lr): trial.config for trial in build_trials(config, [64, 128], 1)
    }
    peaks = [0.005, 0.01, 0.02]
    assert sorted({lr for _, _, lr in found}) == peaks
    for lr in peaks:
        assert found[MUP, 64, lr] == found[WITHOUT_WIDTH_RULES, 64, lr]
        under_mup, without = found[MUP, 128, lr], found[WITHOUT_WIDTH_RULES, 128, lr]
        assert (under_mup.mup.base_hidden_size, without.mup.base_hidden_size) == (64, 128)
        assert under_mup.model == without.model
        assert under_mup.schedule == without.schedule
        assert under_mup.schedule.lr.peak == lr
        assert under_mup.schedule.lr.final / lr == pytest.approx(1e-2)
