"""Show the progress of a check on standard error: a bar on a terminal, otherwise a line for each finished piece.

Pieces differ in cost by orders of magnitude, so progress and time left are counted in units of work.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tandem.trainer.metrics.console import format_duration
from tandem.trainer.metrics.progress import start_wide_bar


class ProgressReporter:
    """A context in which `advance` reports finished work."""

    def __init__(self, name: str, total_work: float, *, enabled: bool = True) -> None:
        self._name, self._total_work, self._done_work, self._start_time = name, total_work, 0.0, time.monotonic()
        self._console = Console(stderr=True, quiet=not enabled)
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressReporter:
        if self._console.is_interactive and self._total_work:
            self._bar = start_wide_bar(self._console, self._name, self._total_work)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, work: float, text: str) -> None:
        """Report that `work` of the total is done; `text` describes it."""
        self._done_work += work
        left_seconds = (time.monotonic() - self._start_time) * (self._total_work / self._done_work - 1)
        line = f"{text} | {100 * self._done_work / self._total_work:.0f}%, {format_duration(left_seconds)} left"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done_work, words=line)
        else:
            self._console.print(f"{self._name}: {line}", markup=False, highlight=False, soft_wrap=True)
