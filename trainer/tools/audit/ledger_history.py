"""Find the lines of a ledger that count: those that led to the checkpoint of the last start, and those of the last start.

Each start states after which line its checkpoint was saved. The search goes backwards from the last start: the lines from a
start to the checkpoint of the next start count, back to the start without a checkpoint. The file is read twice, line by line,
so memory holds only the starts and one number per line.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import open_regular_file, read_lines
from tandem.trainer.data.ledger import LEDGER_FILE
from tandem.trainer.tools.audit.ledger_lines import Attempt, BadStepLine, LedgerLine, SkipLine, StepLine, parse_line


class LedgerHistory:
    """The ledger of a run folder.

    Raises: UserError if there is none, or it has no start.
    """

    def __init__(self, folder: Path):
        self.path = folder / LEDGER_FILE
        if not self.path.is_file():
            found = f"has no {LEDGER_FILE}, which every run writes" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {found}; name the folder of a run that has started")
        self.attempts: list[Attempt] = []
        self.unreadable_lines: list[int] = []
        """Numbers of the lines that cannot be parsed, except an incomplete last line."""
        self.has_torn_last_line = False
        """Whether the last line is incomplete, because the run was killed or is still writing it."""
        self.num_step_lines = 0
        """Lines of steps, including discarded steps."""
        self.skipped_shards: set[tuple[str, str]] = set()
        """Source and file of every shard that was skipped at any time."""
        self.misplaced_attempts: list[Attempt] = []
        """Starts whose checkpoint cannot have been saved after the line that they state."""
        finished_steps = self._scan()
        if not self.attempts:
            raise UserError(
                f"{self.path}: has no start record; the run died before its first step, another version wrote the file, or the "
                "file is not a ledger; name the folder of a run that has started"
            )
        self._mark_effective_lines(finished_steps)

    def rollback_of(self, attempt: Attempt) -> Attempt | None:
        """Return the rollback whose rows a start passes over, or None if there is no such rollback.

        It is the start itself, or the last earlier rollback to the same checkpoint.
        """
        if attempt.start.is_rollback:
            return attempt
        checkpoint = (attempt.step, attempt.start.num_ledger_lines)
        for each in reversed(self.attempts) if attempt.start.skipped_ranges else ():
            is_earlier = each.line_number < attempt.line_number
            if each.start.is_rollback and is_earlier and (each.step, each.start.num_ledger_lines) == checkpoint:
                return each
        return None

    def effective_lines(self) -> Iterator[LedgerLine]:
        """Yield every start, and the other lines that count, in file order. Count the discarded steps of each attempt."""
        attempts, attempt = iter(self.attempts), self.attempts[0]
        for number, found in self._numbered_lines():
            if isinstance(found, Attempt):
                attempt = next(attempts)
                yield attempt
            elif found is not None and number <= attempt.last_effective_line:
                yield found
            elif isinstance(found, StepLine):
                attempt.discard_step(found)

    def _scan(self) -> np.ndarray:
        """Collect the starts and unreadable lines. Return the finished steps before the first line and after each line."""
        finished_steps, step_line, previous = array("q", [0]), 0, None
        cursor: dict[str, int] = {}
        skipped_shards: set[tuple[str, str]] = set()
        for number, found in self._numbered_lines():
            step = finished_steps[-1]
            if isinstance(found, Attempt):
                if (  # the line before is the decision to roll back from the step on the line before that
                    found.start.is_rollback and isinstance(previous, BadStepLine) and previous.action == "rollback"
                    and (previous.step, previous.line_number) == (step, step_line + 1)
                ):  # fmt: skip
                    found.bad_step, found.bad_step_cursor = previous, cursor
                    found.bad_step_skipped_shards = skipped_shards
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
        """Set `last_effective_line` of each attempt."""
        start_lines = np.array([attempt.line_number for attempt in self.attempts])
        checkpoint_lines = [self._checkpoint_line(attempt, finished_steps) for attempt in self.attempts]
        index, end = len(self.attempts) - 1, float("inf")
        while index >= 0:
            self.attempts[index].last_effective_line = end
            end = checkpoint_lines[index]
            index = int(np.searchsorted(start_lines, end, "right")) - 1

    def _checkpoint_line(self, attempt: Attempt, finished_steps: np.ndarray) -> int:
        """Return the line after which an attempt's checkpoint was saved.

        If lines are missing or edited, return the nearest line after which it can have been saved.
        """
        after, before = attempt.start.num_ledger_lines, finished_steps[: attempt.line_number]
        if after < len(before) and before[after] == attempt.step:
            return after
        self.misplaced_attempts.append(attempt)
        likely = np.flatnonzero(before == attempt.step)
        return int(likely[np.abs(likely - after).argmin()]) if len(likely) else len(before) - 1

    def _numbered_lines(self) -> Iterator[tuple[int, LedgerLine | None]]:
        """Yield line numbers and parsed lines. Skip an incomplete last line and set `has_torn_last_line`."""
        with open_regular_file(self.path) as file:
            for number, line in enumerate(read_lines(file), 1):
                found = parse_line(number, line)
                if found is None and not line.endswith(b"\n"):
                    self.has_torn_last_line = True
                else:
                    yield number, found
