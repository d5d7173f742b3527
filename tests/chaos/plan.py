"""Which kills a sweep makes: every call of a save before and after it, every write in its middle, and random times."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.save_tracer import KILL_ENTRY, CallPoint, Kill
from tests.chaos.trial import RANKS, TrialEnd, TrialStart

TEARING_POINT = CallPoint(0, "replace marker 1", "before")
"""Leaves a folder with everything in it but the marker."""
RANDOM_SHARE = 0.1
SINGLE_VICTIMS = [(rank,) for rank in RANKS]
NO_LAUNCHER_SHARE = 0.1
"""Of the starts whose one rank is killed: the other is left alone, to end by itself."""
SAVE_NUMBERS = (1, 1, 2)
"""A kill comes in one of these saves of its process, so that the run gets on between two of them."""


@dataclass(frozen=True)
class PlannedTrial:
    """One trial; `kind` is what the summary counts it as."""

    kind: str
    kill: Kill | None
    kill_fraction: float | None
    """Of a kill at no call: the part of an undisturbed run's time that has passed."""
    victim_ranks: tuple[int, ...]
    has_launcher: bool

    def make_start(self, config: Path, overrides: tuple[str, ...], run_seconds: float) -> TrialStart:
        after_seconds = self.kill_fraction * run_seconds if self.kill_fraction is not None else None
        return TrialStart(config, overrides, self.kill, after_seconds, self.victim_ranks, self.has_launcher)


def kill_points(ends: Iterable[TrialEnd]) -> list[CallPoint]:
    """Every moment that the logs of some runs know. After a chunk of the data is before the next one, and left out."""
    calls = dict.fromkeys((rank, name) for end in ends for rank, _, _, name in end.calls if name != KILL_ENTRY)
    return [
        CallPoint(rank, call, when)
        for rank, call in calls
        for when in (("before", "half") if _is_data_write(call) else ("before", "after"))
    ]


def plan_trials(all_points: list[CallPoint], num_kills: int, rng: random.Random) -> list[list[PlannedTrial]]:
    """At least `num_kills` of them, in groups that are made one after the other; drawn with the same seed, the same.

    Where there are enough of them, every point outside the data kills both ranks, and then one of them, and every chunk of
    the data is met; where there are fewer, a quarter of them are chunks.
    """
    num_random = int(num_kills * RANDOM_SHARE)
    groups: list[list[PlannedTrial]] = [[_random_time_trial(rng)] for _ in range(num_random)]
    call_points = [point for point in all_points if not _is_data_write(point.call)]
    call_trials = [_trial_at_point(point, victims, rng) for victims in (RANKS, None) for point in call_points]
    chunk_trials = [
        _trial_at_point(point, rng.choice([RANKS, *SINGLE_VICTIMS]), rng)
        for point in all_points
        if _is_data_write(point.call)
    ]
    num_remaining = num_kills - num_random
    if num_remaining < len(call_trials) + len(chunk_trials):
        call_trials, chunk_trials = (
            rng.sample(call_trials, num_remaining - num_remaining // 4),
            rng.sample(chunk_trials, num_remaining // 4),
        )
    repeated_trials = rng.choices(call_trials, k=max(0, num_remaining - len(call_trials) - len(chunk_trials)))
    groups += [[each] for each in (*call_trials, *chunk_trials, *repeated_trials)]
    rng.shuffle(groups)
    return [_with_torn_checkpoint(group) for group in groups]


def _is_data_write(call: str) -> bool:
    return call.startswith("write data")


def _with_torn_checkpoint(group: list[PlannedTrial]) -> list[PlannedTrial]:
    """What is done about a torn folder needs one to be there."""
    needs = any(each.kill and "torn" in each.kill.point.call for each in group)
    return [PlannedTrial("call", Kill(TEARING_POINT, 1, RANKS), None, RANKS, True), *group] if needs else group


def _trial_at_point(point: CallPoint, victims: tuple[int, ...] | None, rng: random.Random) -> PlannedTrial:
    victims = victims or rng.choice(SINGLE_VICTIMS)
    early = "torn" in point.call or point.call.startswith("mkdir root")  # before the first save of a process
    save = 0 if early else rng.choice(SAVE_NUMBERS)
    kind = "chunk" if _is_data_write(point.call) else "call"
    return PlannedTrial(kind, Kill(point, save, victims), None, victims, rng.random() >= NO_LAUNCHER_SHARE)


def _random_time_trial(rng: random.Random) -> PlannedTrial:
    victims = rng.choice([RANKS, *SINGLE_VICTIMS])
    # With a launcher always: a rank whose peer dies before they have met waits for it longer than a test can.
    return PlannedTrial("random", None, rng.uniform(0.1, 0.9), victims, True)
