"""What a user should read before the first step: surprises of the learning rate, and values that have changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from tandem.trainer.config import HybridLRConfig, TrainConfig
from tandem.trainer.config.schedule import Timeline

MAX_LISTED_CHANGES = 20
LONG_SHARE = 0.2
"""Share of the run's steps at the final learning rate, after a decay that ended early, from which that is worth a line."""


def learning_rate_notices(timeline: Timeline) -> list[str]:
    """Return a line for each part of the learning rate's schedule that does not fit the length of the run."""
    lr, total_steps = timeline.schedule.lr, timeline.total_steps
    last_lr = timeline.lr_at(total_steps - 1)
    if isinstance(lr, HybridLRConfig):
        start_step = lr.cooldown_start_step
        if start_step is None or start_step + lr.cooldown_steps <= total_steps:
            return []
        return [
            f"schedule.lr.cooldown_steps: the cooldown would end at step {start_step + lr.cooldown_steps:,}, but the run has "
            f"{total_steps:,} steps; its last learning rate is {last_lr:.3g}, not cooldown_final {lr.cooldown_final:.3g}"
        ]
    end_step = total_steps if lr.decay_steps is None else lr.warmup_steps + lr.decay_steps
    if end_step > total_steps and lr.peak > lr.final:
        return [
            f"schedule.lr.decay_steps: the decay would end at step {end_step:,}, but the run has {total_steps:,} steps; its "
            f"last learning rate is {last_lr:.3g}, not final {lr.final:.3g}; null ends the decay with the run"
        ]
    if total_steps - end_step > LONG_SHARE * total_steps:
        return [
            f"schedule.lr.decay_steps: the decay ends at step {end_step:,} of {total_steps:,}; the learning rate stays at "
            f"final {lr.final:.3g} after that"
        ]
    return []


def learning_rate_jump(timeline: Timeline, step: int, last_lr: float, previous: Timeline | None) -> str | None:
    """Return a line if the steps after `step` do not continue the schedule that gave its last update `last_lr`.

    `previous` is the timeline of the last start, if it is known.
    """
    if not 0 < step < timeline.total_steps or math.isclose(timeline.lr_at(step - 1), last_lr, rel_tol=1e-6):
        return None
    change = (
        f"schedule.lr: at step {step + 1:,} the learning rate changes from {last_lr:.3g} to {timeline.lr_at(step):.3g}"
    )
    old_steps = previous.total_steps if previous else timeline.total_steps
    lr = timeline.schedule.lr
    if previous and previous.schedule.lr == lr and lr.decay_steps is None and old_steps != timeline.total_steps:
        kept_steps = old_steps if isinstance(lr, HybridLRConfig) else old_steps - lr.warmup_steps
        return (
            f"{change}, because the decay ends with the run, which now has {timeline.total_steps:,} steps instead of "
            f"{old_steps:,}; schedule.lr.decay_steps={kept_steps} keeps the old curve"
        )
    return f"{change}, because this config gives step {step:,} a learning rate of {timeline.lr_at(step - 1):.3g}"


def changed_values(previous: TrainConfig, config: TrainConfig) -> list[str]:
    """Return one line for each value that differs, old -> new, in the order of the sections; at most MAX_LISTED_CHANGES."""
    old, new = (dict(_leaves(dataclasses.asdict(each), "")) for each in (previous, config))
    absent = "(absent)"
    lines = [
        f"{key_path}: {old.get(key_path, absent)} -> {new.get(key_path, absent)}"
        for key_path in {**new, **old}
        if old.get(key_path, absent) != new.get(key_path, absent)
    ]
    more = [f"and {len(lines) - MAX_LISTED_CHANGES} more"] if len(lines) > MAX_LISTED_CHANGES else []
    return lines[:MAX_LISTED_CHANGES] + more


def _leaves(value: Any, key_path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every field that is not a section or list itself."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{key_path}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key_path}[{index}]")
    else:
        yield key_path, value
