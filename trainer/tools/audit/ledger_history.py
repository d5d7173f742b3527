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
from tandem.trainer.data.ledger import LEDGER_FILE
from tandem.trainer.tools.audit.ledger_lines import Attempt, BadStepLine, LedgerLine, SkipLine, StepLine, parse_line


class LedgerHistory:
    """The ledger of a run folder. Raises: UserError where there is none, or none that tells of a start."""

    def __init__(self, folder: Path):
        self.path = folder / LEDGER_FILE
        if not self.path.is_file():
            found = f"has no {LEDGER_FILE}; the folder of a run has" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {found}; name the folder of a run that has started")
        self.attempts: list[Attempt] = []
        self.unreadable_lines: list[int] = []
        """Numbers of lines that are no ledger's, but for a torn last one."""
        self.has_torn_last_line = False
        """Whether the last line was torn by a kill, or is being written."""
        self.num_step_lines = 0
        """Lines of steps, whether they count or not."""
        self.skipped_shards: set[tuple[str, str]] = set()
        """Source and file of every shard that was left out at any time."""
        self.misplaced_attempts: list[Attempt] = []
        """Starts from a checkpoint that cannot have been made where they say."""
        finished_steps = self._scan()
        if not self.attempts:
            raise UserError(
                f"{self.path}: has no start; the run died before its first step, a version with other names wrote it, or "
                "this is no ledger"
            )
        self._mark_effective_lines(finished_steps)

    def rollback_of(self, attempt: Attempt) -> Attempt | None:
        """The rollback that passes over what a start passes over: itself, or the last one to its checkpoint before it. None for
        a start that passes over nothing, and where there is none.
        """
        if attempt.start.is_rollback:
            return attempt
        checkpoint = (attempt.step, attempt.start.num_ledger_lines)
        before = (
            each
            for each in reversed(self.attempts)
            if each.line_number < attempt.line_number and each.start.is_rollback
        )
        same = (each for each in before if (each.step, each.start.num_ledger_lines) == checkpoint)
        return next(same, None) if attempt.start.skipped_ranges else None

    def effective_lines(self) -> Iterator[LedgerLine]:
        """What counts, in the order of the file: every start, and the other lines that no later one took back. Steps that do
        not count are added up in their attempt.
        """
        attempts, attempt = iter(self.attempts), self.attempts[0]
        for number, found in self._numbered_lines():
            if isinstance(found, Attempt):
                attempt = next(attempts)
                yield attempt
                continue
            attempt.num_steps += isinstance(found, StepLine)
            if found is not None and number <= attempt.last_effective_line:
                yield found
            elif isinstance(found, StepLine):
                attempt.discard_step(found)

    def _scan(self) -> np.ndarray:
        """Starts and what is odd are on record; returns how many steps were finished after each line, and before the first."""
        finished_steps, step_line, previous = array("q", [0]), 0, None
        cursor: dict[str, int] = {}
        skipped_shards: set[tuple[str, str]] = set()
        for number, found in self._numbered_lines():
            step = finished_steps[-1]
            if isinstance(found, Attempt):
                if found.start.is_rollback and _is_rollback_decision(previous, step, step_line):
                    found.bad_step, found.bad_step_cursor, found.bad_step_skipped_shards = (
                        previous,
                        cursor,
                        skipped_shards,
                    )
                self.attempts.append(found)
                step, cursor, skipped_shards = found.step, dict(found.start.cursor), {*found.skipped_shards}
            elif isinstance(found, StepLine):
                self.num_step_lines += 1
                step, step_line = found.step, number
                cursor |= {source: end for source, (_, end) in found.read_ranges.items()}
            elif isinstance(found, SkipLine):
                skipped_shards.add((found.source, found.shard))
            elif found is None:
                self.unreadable_lines.append(number)
            self.skipped_shards |= skipped_shards
            finished_steps.append(step)
            previous = found
        return np.frombuffer(finished_steps, np.int64)

    def _mark_effective_lines(self, finished_steps: np.ndarray) -> None:
        """Of each attempt it is known which of its lines count."""
        start_lines = np.array([attempt.line_number for attempt in self.attempts])
        checkpoint_lines = {
            attempt.line_number: self._checkpoint_line(attempt, finished_steps) for attempt in self.attempts
        }
        index, end = len(self.attempts) - 1, float("inf")
        while index >= 0:
            attempt = self.attempts[index]
            attempt.last_effective_line = end
            end = checkpoint_lines[attempt.line_number]
            index = int(np.searchsorted(start_lines, end, "right")) - 1

    def _checkpoint_line(self, attempt: Attempt, finished_steps: np.ndarray) -> int:
        """The line that an attempt goes on after. Where lines are missing or edited it is the nearest that could be meant."""
        after, before = attempt.start.num_ledger_lines, finished_steps[: attempt.line_number]
        if after < len(before) and before[after] == attempt.step:
            return after
        self.misplaced_attempts.append(attempt)
        likely = np.flatnonzero(before == attempt.step)
        return int(likely[np.abs(likely - after).argmin()]) if len(likely) else len(before) - 1

    def _numbered_lines(self) -> Iterator[tuple[int, LedgerLine | None]]:
        """Lines by number; a torn last one is told of and passed over."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                found = parse_line(number, line)
                if found is None and not line.endswith(b"\n"):
                    self.has_torn_last_line = True
                else:
                    yield number, found


def _is_rollback_decision(found: LedgerLine | None, step: int, line: int) -> TypeGuard[BadStepLine]:
    """Whether it tells that the step, of the line before it, was one to go back from."""
    return (
        isinstance(found, BadStepLine)
        and found.action == "rollback"
        and (found.step, found.line_number) == (step, line + 1)
    )
