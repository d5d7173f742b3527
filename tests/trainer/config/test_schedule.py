"""Schedules match the published numbers, and borders have no off-by-one errors."""

import math
from dataclasses import replace

import pytest

from tandem.trainer.config import CosineLRConfig, HybridLRConfig, LinearLRConfig, LRConfig, PhaseConfig, ScheduleConfig
from tandem.trainer.config.schedule import Timeline

STABLELM_12B = HybridLRConfig(
    kind="hybrid",
    peak=3e-4,
    final=3e-5,
    warmup_steps=4_940,
    decay_steps=760_000,
    switch_fraction=0.25,
    offset_steps=0,
    cooldown_start_step=None,
    cooldown_steps=0,
    cooldown_final=0.0,
)
BTLM_LR = LinearLRConfig(kind="linear", peak=0.012, final=1.0198e-4, warmup_steps=95, decay_steps=159_541)


def phase(name: str, steps: int, seq_len: int, rows: int) -> PhaseConfig:
    return PhaseConfig(name, steps * seq_len * rows, seq_len, rows, 1, {"corpus": 1.0})


def one_phase(lr: LRConfig, steps: int) -> Timeline:
    return Timeline(ScheduleConfig(None, [phase("only", steps, 8, 4)], lr))


@pytest.fixture
def btlm() -> Timeline:
    phases = [phase("2k", 119_727, 2_048, 1_920), phase("8k", 39_909, 8_192, 480)]
    return Timeline(ScheduleConfig(3_932_160, phases, BTLM_LR))


def test_btlm_has_the_published_steps_and_tokens(btlm: Timeline) -> None:
    assert btlm.total_steps == 159_636
    assert btlm.total_tokens == 627_714_293_760
    assert btlm.tokens_before(119_727) == 470_785_720_320


def test_a_phase_ends_one_step_before_the_next_begins(btlm: Timeline) -> None:
    last, first = btlm.phase_span_at(119_726), btlm.phase_span_at(119_727)
    assert (last.index, last.phase.name, last.first_step, last.end_step) == (0, "2k", 0, 119_727)
    assert (first.index, first.phase.name, first.first_step, first.end_step) == (1, "8k", 119_727, 159_636)
    assert btlm.phase_span_at(0).index == 0
    assert btlm.phase_span_at(159_635).index == 1


def test_steps_outside_the_run_have_no_phase(btlm: Timeline) -> None:
    for step in (-1, 159_636):
        with pytest.raises(AssertionError, match="outside the run's 159636 steps"):
            btlm.phase_span_at(step)


def test_tokens_grow_by_each_phases_own_batch() -> None:
    phases = [phase("a", 3, 8, 4), phase("b", 2, 16, 5)]
    timeline = Timeline(ScheduleConfig(None, phases, BTLM_LR))
    assert [timeline.tokens_before(step) for step in range(6)] == [0, 32, 64, 96, 176, 256]
    assert timeline.total_tokens == 256


def test_btlm_learning_rate_is_cerebras(btlm: Timeline) -> None:
    assert btlm.lr_at(0) == 0
    assert btlm.lr_at(1) == pytest.approx(0.012 / 95)
    assert btlm.lr_at(95) == 0.012
    assert btlm.lr_at(119_727) == pytest.approx(3.08e-3, abs=5e-6)  # the published figure has three digits
    assert btlm.lr_at(159_636) == 1.0198e-4
    assert btlm.lr_at(159_635) > 1.0198e-4, "the end value is never used"
    assert btlm.lr_at(200_000) == 1.0198e-4


def test_linear_falls_by_the_same_amount_each_step(btlm: Timeline) -> None:
    slope = (1.0198e-4 - 0.012) / 159_541
    for step in (95, 50_000, 119_726, 159_635):  # the phase border in between is not special
        assert btlm.lr_at(step + 1) - btlm.lr_at(step) == pytest.approx(slope, rel=1e-6)


def test_cosine_passes_half_way_at_the_mean() -> None:
    timeline = one_phase(CosineLRConfig("cosine", 1.0, 0.1, warmup_steps=10, decay_steps=None), 110)
    assert [timeline.lr_at(step) for step in (0, 5, 10)] == [0, 0.5, 1.0]
    assert timeline.lr_at(60) == pytest.approx(0.55)
    assert timeline.lr_at(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert timeline.lr_at(110) == pytest.approx(0.1)


def test_null_decays_to_the_end_of_the_run() -> None:
    lr = LinearLRConfig("linear", 1.0, 0.0, warmup_steps=10, decay_steps=None)
    assert [one_phase(lr, 110).lr_at(step) for step in (10, 60, 110)] == [1.0, 0.5, 0.0]


def test_without_warmup_the_first_update_has_the_peak() -> None:
    assert one_phase(LinearLRConfig("linear", 1.0, 0.0, warmup_steps=0, decay_steps=None), 10).lr_at(0) == 1.0


@pytest.mark.parametrize(
    ("step", "published"),
    [
        (100_000, 2.564e-4),
        (190_000, 1.650e-4),
        (300_000, 1.046e-4),
        (400_000, 8.42e-5),
        (500_000, 7.24e-5),
        (600_000, 6.45e-5),
        (760_000, 5.59e-5),
    ],
)
def test_hybrid_has_the_values_of_the_12b(step: int, published: float) -> None:
    assert one_phase(STABLELM_12B, 760_000).lr_at(step) == pytest.approx(published, rel=1e-3)  # its digits


def test_hybrid_tail_is_alpha_over_root_of_step_plus_beta() -> None:
    timeline, alpha, beta = one_phase(STABLELM_12B, 760_000), 0.0448602, -116_081.4
    for step in (190_001, 400_000, 759_999):
        assert timeline.lr_at(step) == pytest.approx(alpha / math.sqrt(step + beta), rel=2e-6)  # alpha's digits


@pytest.mark.parametrize("switch_fraction", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("offset_steps", [0, 4_940])
def test_hybrid_value_and_slope_are_continuous_at_the_switch(switch_fraction: float, offset_steps: int) -> None:
    lr = replace(STABLELM_12B, switch_fraction=switch_fraction, offset_steps=offset_steps)
    timeline, switch = one_phase(lr, 760_000), round(switch_fraction * 760_000) + offset_steps
    before, at, after = (timeline.lr_at(switch + step) for step in (-1, 0, 1))
    assert at - before == pytest.approx(after - at, rel=1e-4)  # one step bends the curve by about 1 / period
    assert (after - before) / 2 == pytest.approx(
        -(3e-4 - 3e-5) * math.pi / 760_000 * math.sin(2 * math.pi * switch_fraction), rel=1e-4
    )


def test_offset_moves_the_curve_and_not_the_warmup() -> None:
    plain, moved = (
        one_phase(STABLELM_12B, 760_000),
        one_phase(replace(STABLELM_12B, offset_steps=4_940), 760_000),
    )
    assert moved.lr_at(4_000) == plain.lr_at(4_000)
    assert moved.lr_at(4_940) == plain.lr_at(4_940) == 3e-4
    for step in (50_000, 300_000):
        assert moved.lr_at(step + 4_940) == plain.lr_at(step)


def test_cooldown_is_a_line_from_the_current_rate() -> None:
    lr = replace(STABLELM_12B, cooldown_start_step=500_000, cooldown_steps=100_000, cooldown_final=1e-6)
    plain, cooled = one_phase(STABLELM_12B, 760_000), one_phase(lr, 760_000)
    start = plain.lr_at(500_000)
    assert cooled.lr_at(499_999) == plain.lr_at(499_999)
    assert cooled.lr_at(500_000) == start
    assert cooled.lr_at(550_000) == pytest.approx((start + 1e-6) / 2)
    assert cooled.lr_at(600_000) == pytest.approx(1e-6)
    assert cooled.lr_at(700_000) == pytest.approx(1e-6)


def test_hybrid_with_equal_ends_is_constant() -> None:
    timeline = one_phase(replace(STABLELM_12B, final=3e-4), 760_000)
    assert {timeline.lr_at(step) for step in (4_940, 100_000, 700_000)} == {3e-4}
