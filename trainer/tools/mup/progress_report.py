"""Show the progress of a check on standard error: a bar on a terminal, otherwise one line for each finished part.

The costs of parts differ by orders of magnitude, so progress and remaining time are measured in units of work.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tandem.trainer.config.numbers import format_duration
from tandem.trainer.metrics.progress import open_screen, start_wide_bar


@contextmanager
def report_progress(name: str, total_work: float, *, enabled: bool = True) -> Iterator[Callable[[float, str], None]]:
    """Yield a function that reports finished work, given its amount and a description."""
    console, start_time, done_work = open_screen(), time.monotonic(), 0.0
    console.quiet = not enabled
    bar = start_wide_bar(console, name, total_work) if console.is_interactive and total_work else None

    def advance(work: float, text: str) -> None:
        nonlocal done_work
        done_work += work
        left_seconds = (time.monotonic() - start_time) * (total_work / done_work - 1)
        line = f"{text} | {100 * done_work / total_work:.0f}%, {format_duration(left_seconds)} left"
        if bar:
            bar.update(bar.task_ids[0], completed=done_work, words=line)
        else:
            console.print(f"{name}: {line}", markup=False, highlight=False, soft_wrap=True)

    try:
        yield advance
    finally:
        if bar:
            bar.stop()
