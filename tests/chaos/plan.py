"""Which kills a sweep makes: every call of a save before and after it, every write in its middle, and random times."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.save_tracer import KILLED, Kill, Point
from tests.chaos.trial import RANKS, End, Start

TEARING = Point(0, "replace marker 1", "before")
"""Leaves a folder with everything in it but the marker."""
RANDOM_SHARE = 0.1
VICTIMS = [(rank,) for rank in RANKS]
ALONE_SHARE = 0.1
"""Of the starts whose one rank is killed: the other is left alone, to end by itself."""
SAVES = (1, 1, 2)
"""A kill comes in one of these saves of its process, so that the run gets on between two of them."""


@dataclass(frozen=True)
class Planned:
    """One trial; `kind` is what the summary counts it as."""

    kind: str
    kill: Kill | None
    moment: float | None
    """Of a kill at no call: the part of an undisturbed run's time that has passed."""
    victims: tuple[int, ...]
    launcher: bool

    def start(self, config: Path, overrides: tuple[str, ...], run_seconds: float) -> Start:
        after_seconds = self.moment * run_seconds if self.moment is not None else None
        return Start(config, overrides, self.kill, after_seconds, self.victims, self.launcher)


def points(ends: Iterable[End]) -> list[Point]:
    """Every moment that the logs of some runs know. After a chunk of the data is before the next one, and left out."""
    calls = dict.fromkeys((rank, name) for end in ends for rank, _, _, name in end.log if name != KILLED)
    return [
        Point(rank, call, when)
        for rank, call in calls
        for when in (("before", "half") if _is_bulk(call) else ("before", "after"))
    ]


def plan(found: list[Point], kills: int, draw: random.Random) -> list[list[Planned]]:
    """At least `kills` of them, in groups that are made one after the other; drawn with the same seed, the same.

    Where there are enough of them, every point outside the data kills both ranks, and then one of them, and every chunk of
    the data is met; where there are fewer, a quarter of them are chunks.
    """
    num_random = int(kills * RANDOM_SHARE)
    groups: list[list[Planned]] = [[_anytime(draw)] for _ in range(num_random)]
    outside = [point for point in found if not _is_bulk(point.call)]
    named = [_at(point, victims, draw) for victims in (RANKS, None) for point in outside]
    chunks = [_at(point, draw.choice([RANKS, *VICTIMS]), draw) for point in found if _is_bulk(point.call)]
    left = kills - num_random
    if left < len(named) + len(chunks):
        named, chunks = draw.sample(named, left - left // 4), draw.sample(chunks, left // 4)
    more = draw.choices(named, k=max(0, left - len(named) - len(chunks)))
    groups += [[each] for each in (*named, *chunks, *more)]
    draw.shuffle(groups)
    return [_prepared(group) for group in groups]


def _is_bulk(call: str) -> bool:
    return call.startswith("write data")


def _prepared(group: list[Planned]) -> list[Planned]:
    """What is done about a torn folder needs one to be there."""
    needs = any(each.kill and "torn" in each.kill.point.call for each in group)
    return [Planned("call", Kill(TEARING, 1, RANKS), None, RANKS, True), *group] if needs else group


def _at(point: Point, victims: tuple[int, ...] | None, draw: random.Random) -> Planned:
    victims = victims or draw.choice(VICTIMS)
    early = "torn" in point.call or point.call.startswith("mkdir root")  # before the first save of a process
    save = 0 if early else draw.choice(SAVES)
    kind = "chunk" if _is_bulk(point.call) else "call"
    return Planned(kind, Kill(point, save, victims), None, victims, draw.random() >= ALONE_SHARE)


def _anytime(draw: random.Random) -> Planned:
    victims = draw.choice([RANKS, *VICTIMS])
    # With a launcher always: a rank whose peer dies before they have met waits for it longer than a test can.
    return Planned("random", None, draw.uniform(0.1, 0.9), victims, True)
