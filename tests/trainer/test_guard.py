"""The guard's judgement of single steps."""

import dataclasses
import json
import math

import pytest

from tandem.trainer.config import GuardConfig as Settings
from tandem.trainer.config import PhaseConfig
from tandem.trainer.guard import Guard, Judgement

SHORT, LONG = (
    PhaseConfig(name, 4096, seq_len, 8, 1, {"corpus": 1.0}) for name, seq_len in (("short", 32), ("long", 128))
)


def judged(guard: Guard, values: list[tuple[float, float]], phase: PhaseConfig = SHORT) -> list[str]:
    return [guard.judge(phase, *value).decision for value in values]


def steady(num: int) -> list[tuple[float, float]]:
    """Losses and gradient norms that vary by a few percent."""
    return [(3 + 0.1 * math.sin(step), 1 + 0.05 * math.cos(step)) for step in range(num)]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.nan), (math.inf, 1.0)])
def test_what_is_not_finite_is_bad_from_the_first_step_on(bad):
    assert judged(Guard(Settings()), [bad, (3.0, 1.0), bad]) == ["skip", "update", "skip"]


def test_so_many_are_skipped_then_the_run_goes_back_and_that_is_counted():
    guard, bad = Guard(Settings(max_skips=2), num_rollbacks={7: 1}), (math.nan, 1.0)
    start = guard.state_dict()
    assert judged(guard, [bad, bad, bad]) == ["skip", "skip", "rollback"]
    guard.roll_back(7, start)
    assert judged(guard, [(3.0, 1.0), bad, bad, bad]) == ["update", "skip", "skip", "rollback"]
    assert (guard.num_rollbacks_to(7), guard.num_rollbacks_to(8)) == (2, 0)


@pytest.mark.parametrize(("loss", "norm", "named"), [(4.5, 1.0, "loss 4.5 is "), (3.0, 2.0, "gradient norm 2 is ")])
def test_a_spike_of_either_is_bad_and_named(loss, norm, named):
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    assert set(judged(guard, steady(32))) == {"update"}
    found = guard.judge(SHORT, loss, norm)
    assert found.decision == "skip"
    assert found.reason.startswith(named)
    assert found.reason.endswith("the median of 32 steps")


def test_sigmas_are_those_of_a_normal_distribution():
    """One sigma is 1.4826 times the median deviation of the 33 values, so the limit is 8 times that above the median."""
    guard = Guard(Settings(spike_sigmas=8.0, window_steps=33))
    values = [10.0 + ((step % 3) - 1) * (1 + step / 100) for step in range(33)]
    middle, deviation = sorted(values)[16], sorted(abs(value - sorted(values)[16]) for value in values)[16]
    judged(guard, [(value, 1.0) for value in values])
    limit = middle + 8 * 1.4826 * deviation
    assert guard.judge(SHORT, limit * (1 + 1e-9), 1.0).decision == "skip"
    assert guard.judge(SHORT, limit * (1 - 1e-9), 1.0).decision == "update"


@pytest.mark.parametrize("changed", [{"seq_len": 128}, {"global_batch_size": 16}, {"mixture": {"other": 1.0}}])
def test_what_other_rows_or_other_data_change_is_no_spike(changed):
    """This also holds after a restart, because the checkpoint keeps the comparison key of the earlier steps."""
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    judged(guard, steady(32))
    again = Guard(Settings(spike_sigmas=6.0, window_steps=32), json.loads(json.dumps(guard.state_dict())))
    for each in (guard, again):
        assert each.judge(SHORT, 4.5, 1.0).decision == "skip"
        assert each.judge(dataclasses.replace(SHORT, **changed), 4.5, 1.0).decision == "update"


def test_falls_and_early_steps_and_equal_values_are_no_spikes():
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    assert judged(guard, [(3.0, 1.0), (30.0, 10.0)]) == ["update", "update"], "before the window is full"
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    judged(guard, steady(32))
    assert judged(guard, [(0.1, 0.01)]) == ["update"], "downwards"
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    judged(guard, [(3.0, 1.0)] * 32)
    assert judged(guard, [(3.0 * (1 + 1e-6), 1.0)]) == ["update"], "rounding of rows that repeat"


def test_rows_of_another_length_are_compared_with_their_like():
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32))
    judged(guard, steady(32))
    assert judged(guard, [(5.0, 3.0)], LONG) == ["update"]


def test_a_bad_step_does_not_become_what_others_are_compared_with():
    guard = Guard(Settings(spike_sigmas=6.0, window_steps=32, max_skips=100))
    judged(guard, steady(32))
    assert set(judged(guard, [(9.0, 1.0)] * 40)) == {"skip"}


def test_off_it_lets_every_finite_step_pass():
    assert set(judged(Guard(Settings()), [*steady(200), (1e6, 1e6)])) == {"update"}


def test_a_state_that_went_through_a_checkpoint_judges_alike():
    one = Guard(Settings(spike_sigmas=3.0, window_steps=16, max_skips=1))
    judged(one, [*steady(20), (math.nan, 1.0)])
    other = Guard(Settings(spike_sigmas=3.0, window_steps=16, max_skips=1), json.loads(json.dumps(one.state_dict())))
    for value in [*steady(40)[20:], (3.4, 1.0), (3.0, math.nan), (math.nan, 1.0)]:
        assert other.judge(SHORT, *value) == one.judge(SHORT, *value)
    assert one.judge(SHORT, math.nan, 1.0) == Judgement("rollback", "loss is not finite")
