"""A run on two ranks, killed at every moment of its saves: nothing committed is lost or wrong, and it ends as if never killed.

CHAOS_KILLS sets how many kills (`launch/test.sh chaos`: 600); the run of all tests makes a few dozen of every kind.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.chaos.plan import TEARING_POINT, PlannedTrial, kill_points, plan_trials
from tests.chaos.save_tracer import Kill
from tests.chaos.trial import (
    RANKS,
    Launcher,
    TrialEnd,
    TrialStart,
    UndisturbedRun,
    checkpoint_faults,
    final_faults,
    newest_step,
    start_steps,
)
from tests.promises.conftest import two_phase_config

KILLS = int(os.environ.get("CHAOS_KILLS", "24"))
LAYOUTS = {"tp 2": 2, "dp 2": 1}
PROGRESS_KILLS, TRIES = 50, 4
END_CODES, LONGEST_ALONE_SECONDS = (0, 85), 60.0
"""Of a rank that was left alone and ended by itself: long before the patience of a start, on the busiest of machines."""

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300 + 6 * KILLS)]


class Sweep:
    """Trials in one run folder after another, each of which is killed again and again until it is finished."""

    def __init__(self, root: Path, corpus: Path, name: str, tp_size: int, tell: Callable[[str], None]) -> None:
        self._root, self._launcher, self._number, self._name = root, Launcher(root / "trials"), 0, name
        self._tell = tell
        tree = two_phase_config(
            "stablelm",
            corpus,
            root / "runs",
            run={"max_repeat_failures": 0},
            parallel={"tp_size": tp_size},
            checkpoint={"every_steps": 1, "keep_last": 2},
            watchdog={"step_timeout_seconds": 30.0, "start_timeout_seconds": 180.0},
        )
        for phase in tree["schedule"]["phases"]:
            phase["micro_batch_size"] = phase["global_batch_size"] * tp_size // len(RANKS)  # kills are about saves
        self._config = root / "config.yaml"
        self._config.write_text(yaml.safe_dump(tree))
        self.kinds, self.faults, self.missed = Counter[str](), list[str](), list[PlannedTrial]()
        self.alone_seconds: list[float] = []
        straight = self._started("straight", "checkpoint.keep_last=0")
        self.truth = UndisturbedRun(root / "runs" / "straight")
        torn = self._started("torn", kill=Kill(TEARING_POINT, 3, RANKS))
        assert straight.exit_codes == [0, 0]
        assert torn.was_killed
        began = time.monotonic()
        after = self._started("torn")
        self._run_seconds = time.monotonic() - began
        assert after.exit_codes == [0, 0]
        self.points = kill_points([straight, torn, after])

    @property
    def kills(self) -> int:
        return self.kinds.total()

    @property
    def folder(self) -> Path:
        return self._root / "runs" / f"killed-{self._number:03d}"

    def make(self, planned: PlannedTrial) -> None:
        """The trial is made, and what it left is compared with the undisturbed run; one that was over too early is repeated."""
        if not any(self._trial(planned) for _ in range(TRIES)):
            self.missed.append(planned)

    def finish(self, last: TrialEnd) -> None:
        """The run in the folder under way has ended with this start, and the next trial begins another."""
        self._note(final_faults(self.folder, self.truth, last), f"{self._name}, {self.folder.name}, at the end")
        self._number += 1

    def _trial(self, planned: PlannedTrial) -> bool:
        """Whether it came to the kill."""
        before, starts, began = newest_step(self.folder), start_steps(self.folder), time.monotonic()
        end = self._started(self.folder.name, *self._every(), planned=planned)
        least, words = (
            max(before, end.committed_step),
            f"{self._name}, {self.folder.name}, {planned}, exit codes {end.exit_codes}",
        )
        self._note(checkpoint_faults(self.folder, self.truth, least), words)
        if any(step != max(before, 0) for step in start_steps(self.folder)[len(starts) :]):
            self._note([f"lost: step {before} was the newest and was not continued"], words)
        if not end.was_killed and end.exit_codes != [0, 0]:
            self._note(["wrong: it ended by itself"], words)
        if end.survivor_seconds is not None:
            self.alone_seconds.append(end.survivor_seconds)
            if not any(code in END_CODES for code in end.exit_codes):
                self._note(["wrong: a rank that was left alone has crashed"], words)
            if end.survivor_seconds > LONGEST_ALONE_SECONDS:
                self._note([f"wrong: a rank that was left alone has ended after {end.survivor_seconds:.0f} s"], words)
        if end.exit_codes == [0, 0]:
            self._run_seconds = min(self._run_seconds, time.monotonic() - began)  # the machine has less other work now
            self.finish(end)
        if end.was_killed:
            victims = "both ranks" if len(planned.victim_ranks) == 2 else f"rank {planned.victim_ranks[0]}"
            self.kinds[f"{planned.kind}, {victims}"] += 1
            if self.kills % PROGRESS_KILLS == 0:
                self._tell(f"{self._name}: {self.kills} kills, {len(self.faults)} faults")
        return end.was_killed

    def end(self) -> None:
        """The last run is finished."""
        end = self._started(self.folder.name, *self._every())
        if end.exit_codes != [0, 0]:
            self._note(["wrong: the last start did not finish"], self.folder.name)
        self.finish(end)

    def _every(self) -> tuple[str, ...]:
        return (f"checkpoint.every_steps={1 + self._number % 2}",)

    def _started(
        self, name: str, *overrides: str, kill: Kill | None = None, planned: PlannedTrial | None = None
    ) -> TrialEnd:
        overrides = (f"run.name={name}", *overrides)
        start = (
            planned.make_start(self._config, overrides, self._run_seconds)
            if planned
            else TrialStart(self._config, overrides, kill)
        )
        return self._launcher.run(start, self._root / "runs" / name)

    def _note(self, found: list[str], words: str) -> None:
        for fault in found:
            self.faults.append(f"{fault} ({words})")
            self._tell(self.faults[-1])


def summary(sweeps: list[Sweep], seconds: float) -> str:
    kinds = sum((sweep.kinds for sweep in sweeps), Counter[str]())
    found = [fault for sweep in sweeps for fault in sweep.faults]
    alone = sorted(second for sweep in sweeps for second in sweep.alone_seconds)
    lines = [f"{number:5d} kills: {kind}" for kind, number in sorted(kinds.items())]
    lines += [f"{kinds.total():5d} kills together, in {seconds:.0f} s"]
    lines += [f"{sum(fault.startswith(word) for fault in found):5d} {word} states" for word in ("lost", "wrong")]
    lines += [f"{sum(len(sweep.missed) for sweep in sweeps):5d} moments that no run came to"]
    if alone:
        lines += [f"{len(alone):5d} ranks left alone that ended by themselves, the slowest after {alone[-1]:.1f} s"]
    return "\n".join(["", *lines, *found])


def test_no_kill_at_any_moment_of_a_save_loses_or_changes_a_state(tmp_path, corpus, capsys):
    def tell(words: str) -> None:
        with capsys.disabled():
            print(words, flush=True)

    began, draw, sweeps = time.monotonic(), random.Random(1), []
    for name, tp_size in LAYOUTS.items():
        root = tmp_path / name.replace(" ", "-")
        (root / "trials").mkdir(parents=True)
        sweep = Sweep(root, corpus, name, tp_size, tell)
        for group in plan_trials(sweep.points, KILLS // len(LAYOUTS), draw):
            for planned in group:
                sweep.make(planned)
        sweep.end()
        sweeps.append(sweep)
    tell(summary(sweeps, time.monotonic() - began))
    assert not [fault for sweep in sweeps for fault in sweep.faults]
    assert not [planned for sweep in sweeps for planned in sweep.missed]
    assert sum(sweep.kills for sweep in sweeps) >= KILLS
