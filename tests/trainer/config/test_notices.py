"""The learning rate never changes without a line that says so, and a resume lists what differs."""

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.trainer.config import TrainConfig, load_config
from tandem.trainer.config.notices import (
    MAX_LISTED_CHANGES,
    changed_values,
    learning_rate_jump,
    learning_rate_notices,
)
from tandem.trainer.config.schedule import Timeline

CONFIGS = Path(__file__).parents[3] / "configs"
BTLM, STABLELM = CONFIGS / "demo-btlm.yaml", CONFIGS / "demo-stablelm.yaml"
"""BTLM: linear, open-ended, 20 steps of warm-up, 300 + 150 steps of 2,048 tokens, peak 0.012. Stable LM: hybrid."""


def demo(*overrides: str, path: Path = BTLM) -> TrainConfig:
    return load_config(path, list(overrides))


def timeline(*overrides: str, path: Path = BTLM) -> Timeline:
    return Timeline(demo(*overrides, path=path).schedule)


def test_an_extension_that_heats_the_run_again_is_said_with_the_way_to_keep_the_curve() -> None:
    before, after = timeline(), timeline("schedule.phases[1].tokens=1_228_800")
    line = learning_rate_jump(after, 440, before.lr_at(439), before)
    assert line == (
        "schedule.lr: at step 441 the learning rate changes from 0.000406 to 0.00632, because the decay ends with the run, "
        "which now has 900 steps instead of 450; schedule.lr.decay_steps=430 keeps the old curve"
    )
    kept = timeline("schedule.phases[1].tokens=1_228_800", "schedule.lr.decay_steps=430")
    assert [kept.lr_at(step) for step in range(450)] == [before.lr_at(step) for step in range(450)]
    assert learning_rate_jump(kept, 440, before.lr_at(439), before) is None


def test_the_curve_of_a_hybrid_schedule_is_kept_too() -> None:
    open_ended = ("schedule.lr.decay_steps=null", "schedule.lr.cooldown_start_step=null")
    longer = (*open_ended, "schedule.phases[1].tokens=614_400")
    before, after = timeline(*open_ended, path=STABLELM), timeline(*longer, path=STABLELM)
    line = learning_rate_jump(after, 200, before.lr_at(199), before)
    assert line is not None
    assert line.endswith("schedule.lr.decay_steps=450 keeps the old curve")
    kept = timeline(*longer, "schedule.lr.decay_steps=450", path=STABLELM)
    assert [kept.lr_at(step) for step in range(450)] == [before.lr_at(step) for step in range(450)]


@pytest.mark.parametrize("has_previous", [True, False])
def test_another_peak_is_a_jump_even_if_the_last_config_is_unknown(has_previous: bool) -> None:
    before, after = timeline(), timeline("schedule.lr.peak=0.02")
    line = learning_rate_jump(after, 30, before.lr_at(29), before if has_previous else None)
    assert line is not None
    assert line.startswith(
        "schedule.lr: at step 31 the learning rate changes from 0.0118 to 0.0195, because this config gives"
    )


@pytest.mark.parametrize("step", [0, 1, 20, 300, 449, 450])
def test_the_same_schedule_has_no_jump(step: int) -> None:
    assert learning_rate_jump(timeline(), step, timeline().lr_at(max(0, step - 1)), timeline()) is None


@pytest.mark.parametrize(
    ("overrides", "path", "start"),
    [
        (["schedule.lr.decay_steps=2000"], BTLM,
         "schedule.lr.decay_steps: the decay would end at step 2,020, but the run has 450 steps; its last learning rate "
         "is 0.00945, not final 0.000102; null ends the decay with the run"),
        (["schedule.lr.decay_steps=100"], BTLM,
         "schedule.lr.decay_steps: the decay ends at step 120 of 450; the learning rate stays at final 0.000102 after that"),
        (["schedule.lr.cooldown_start_step=440", "schedule.lr.cooldown_steps=20"], STABLELM,
         "schedule.lr.cooldown_steps: the cooldown would end at step 460, but the run has 450 steps; its last"),
        (["schedule.lr.cooldown_start_step=1000", "schedule.lr.cooldown_steps=20"], STABLELM,
         "schedule.lr.cooldown_steps: the cooldown would end at step 1,020"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_the_run_is_said(overrides: list[str], path: Path, start: str) -> None:
    (line,) = learning_rate_notices(timeline(*overrides, path=path))
    assert line.startswith(start)


def test_shipped_configs_have_no_notice() -> None:
    found = {path.stem: learning_rate_notices(timeline(path=path)) for path in sorted(CONFIGS.glob("*.yaml"))}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_changed_values_are_listed_old_to_new() -> None:
    changed = demo(
        "optim.weight_decay=0.2",
        "schedule.phases[1].micro_batch_size=4",
        "data.sources.more=/more",
        "run.init_from=/x",
        "schedule.phases[1].mixture={corpus: 1.0, more: 0.0}",
    )
    assert changed_values(demo(), changed) == [
        "run.init_from: None -> /x",
        "schedule.phases[1].micro_batch_size: 2 -> 4",
        "schedule.phases[1].mixture.more: (absent) -> 0.0",
        "optim.weight_decay: 0.1 -> 0.2",
        "data.sources.more: (absent) -> /more",
    ]
    assert changed_values(demo(), demo()) == []
    many = replace(demo(), data=replace(demo().data, sources={f"s{number}": "/x" for number in range(30)}))
    assert len(changed_values(demo(), many)) == MAX_LISTED_CHANGES + 1
