"""The ledger as it counts: the line of checkpoints that the last start comes from, and what was taken back beside it.

Each start says after which line its checkpoint was made, so the run as it counts is followed back from the last one: the lines
from a start up to the checkpoint that the next one goes on from, and so on to the start from nothing. Read twice, line by
line, so that a long run takes no more memory than its starts and one number a line.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.ledger import FILE
from tandem.trainer.tools.audit.ledger_lines import Attempt, Bad, Record, Skip, Step, record


class History:
    """The ledger of a run folder. Raises: UserError where there is none, or none that tells of a start."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        if not self.path.is_file():
            found = f"has no {FILE}; the folder of a run has" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {found}; name the folder of a run that has started")
        self.attempts: list[Attempt] = []
        self.unreadable: list[int] = []
        """Numbers of lines that are no ledger's, but for a torn last one."""
        self.torn = False
        """Whether the last line was torn by a kill, or is being written."""
        self.steps_made = 0
        """Lines of steps, whether they count or not."""
        self.left_out: set[tuple[str, str]] = set()
        """Source and file of every shard that was left out at any time."""
        self.astray: list[Attempt] = []
        """Starts from a checkpoint that cannot have been made where they say."""
        standing = self._first_reading()
        if not self.attempts:
            raise UserError(f"{self.path}: has no start; the run died before its first step, or this is no ledger")
        self._follow_back(standing)

    def rollback_of(self, attempt: Attempt) -> Attempt | None:
        """The rollback that passes over what a start passes over: itself, or the last one to its checkpoint before it. None for
        a start that passes over nothing, and where there is none.
        """
        if attempt.start.rollback:
            return attempt
        checkpoint = (attempt.step, attempt.start.after)
        before = (each for each in reversed(self.attempts) if each.line < attempt.line and each.start.rollback)
        same = (each for each in before if (each.step, each.start.after) == checkpoint)
        return next(same, None) if attempt.start.passed else None

    def accepted(self) -> Iterator[Record]:
        """What counts, in the order of the file: every start, and the other lines that no later one took back. Steps that do
        not count are added up in their attempt.
        """
        attempts, attempt = iter(self.attempts), self.attempts[0]
        for number, found in self._records():
            if isinstance(found, Attempt):
                attempt = next(attempts)
                yield attempt
                continue
            attempt.made += isinstance(found, Step)
            if found is not None and number <= attempt.counts_until:
                yield found
            elif isinstance(found, Step):
                attempt.throw_away(found)

    def _first_reading(self) -> np.ndarray:
        """Starts and what is odd are on record; returns how many steps were finished after each line, and before the first."""
        standing, step_line, before = array("q", [0]), 0, None
        reached: dict[str, int] = {}
        met: set[tuple[str, str]] = set()
        for number, found in self._records():
            step = standing[-1]
            if isinstance(found, Attempt):
                if found.start.rollback and _ends(before, step, step_line):
                    found.bad, found.reached, found.met = before, reached, met
                self.attempts.append(found)
                step, reached, met = found.step, dict(found.start.cursor), {*found.skips}
            elif isinstance(found, Step):
                self.steps_made += 1
                step, step_line = found.number, number
                reached |= {source: end for source, (_, end) in found.taken.items()}
            elif isinstance(found, Skip):
                met.add((found.source, found.shard))
            elif found is None:
                self.unreadable.append(number)
            self.left_out |= met
            standing.append(step)
            before = found
        return np.frombuffer(standing, np.int64)

    def _follow_back(self, standing: np.ndarray) -> None:
        """Of each attempt it is known which of its lines count."""
        begins = np.array([attempt.line for attempt in self.attempts])
        ends = {attempt.line: self._end_before(attempt, standing) for attempt in self.attempts}
        index, end = len(self.attempts) - 1, float("inf")
        while index >= 0:
            attempt = self.attempts[index]
            attempt.counts_until = end
            end = ends[attempt.line]
            index = int(np.searchsorted(begins, end, "right")) - 1

    def _end_before(self, attempt: Attempt, standing: np.ndarray) -> int:
        """The line that an attempt goes on after. Where lines are missing or edited it is the nearest that could be meant."""
        after, before = attempt.start.after, standing[: attempt.line]
        if after < len(before) and before[after] == attempt.step:
            return after
        self.astray.append(attempt)
        likely = np.flatnonzero(before == attempt.step)
        return int(likely[np.abs(likely - after).argmin()]) if len(likely) else len(before) - 1

    def _records(self) -> Iterator[tuple[int, Record | None]]:
        """Lines by number; a torn last one is told of and passed over."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found = record(number, line)
                if found is None and not line.endswith(b"\n"):
                    self.torn = True
                else:
                    yield number, found


def _ends(found: Record | None, step: int, line: int) -> TypeGuard[Bad]:
    """Whether it tells that the step, of the line before it, was one to go back from."""
    return isinstance(found, Bad) and found.decision == "rollback" and (found.step, found.line) == (step, line + 1)
