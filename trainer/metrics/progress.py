"""Bars on standard error while something takes long; nothing where that is no terminal. Nothing here imports torch.

`progress_bar` is a bar for one piece of work, which goes when the work is done. Others build on `progress_display`, for
several pieces whose bars stay, and on `start_wide_bar`, one bar over the whole width with words behind it, on a console
that the caller prints on too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Unit = Literal["bytes", "steps", "share"]
"""What stands behind a bar: bytes and their speed, how many steps of all, or per cent."""
REFRESHES_PER_SECOND = 4


@contextmanager
def progress_bar(description: str, total: float | int, unit: Unit = "share") -> Iterator[Callable[[float | int], None]]:
    """The bar stands while the block runs; what is yielded moves it by so much of the total."""
    screen = Console(stderr=True)
    with progress_display(screen, unit, transient=True, disable=not screen.is_interactive) as found:
        yield add_task(found, description, total)


def progress_display(screen: Console, unit: Unit, *, transient: bool = False, disable: bool = False) -> Progress:
    """A context for bars that `add_task` adds. They stay unless `transient`: also where the screen is no terminal, which
    gets them once, at the end, unless `disable`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), *_numbers(unit), TimeRemainingColumn())
    return Progress(*columns, console=screen, transient=transient, disable=disable)


def add_task(found: Progress, what: str, total: float | int) -> Callable[[float | int], None]:
    """There is one bar more; the result moves it by so much of the total."""
    task = found.add_task(what, total=total)
    return lambda done: found.advance(task, done)


def start_wide_bar(screen: Console, what: str, total: float | int, *, completed: int = 0, words: str = "") -> Progress:
    """One bar over the whole width, begun; its `words` and description change with `update`."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[words]}"))
    found = Progress(*columns, console=screen, expand=True, refresh_per_second=REFRESHES_PER_SECOND)
    found.add_task(what, total=total, completed=completed, words=words)
    found.start()
    return found


def _numbers(unit: Unit) -> tuple[str | ProgressColumn, ...]:
    if unit == "bytes":
        return DownloadColumn(), TransferSpeedColumn()
    return (MofNCompleteColumn(), "steps") if unit == "steps" else (TaskProgressColumn(),)
