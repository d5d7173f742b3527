"""How far a check is, on standard error: a bar where that is a terminal, a line for each finished piece where it is not.

Pieces differ in cost by orders of magnitude, so progress is counted in their own unit of work, and so is the time left.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as Bar

from tandem.trainer.metrics.console import duration
from tandem.trainer.metrics.progress import across


class Progress:
    """A context in which `advance` shows what was done."""

    def __init__(self, name: str, total: float, *, shown: bool = True) -> None:
        self._name, self._total, self._done, self._began = name, total, 0.0, time.monotonic()
        self._screen = Console(stderr=True, quiet=not shown)
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._screen.is_interactive and self._total:
            self._bar = across(self._screen, self._name, self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, work: float, text: str) -> None:
        """`work` of the total is done; `text` says what."""
        self._done += work
        left = (time.monotonic() - self._began) * (self._total / self._done - 1)
        line = f"{text} | {100 * self._done / self._total:.0f}%, {duration(left)} left"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, words=line)
        else:
            self._screen.print(f"{self._name}: {line}", markup=False, highlight=False, soft_wrap=True)
