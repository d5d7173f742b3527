"""Progress bars on standard error for long tasks; nothing if it is not a terminal. Works without torch.

`progress_bar` shows one task and disappears when the task is done. `progress_display` shows several tasks and keeps their bars.
`start_wide_bar` shows one bar over the whole width, followed by text, on a console that the caller also prints to.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import rich.progress as columns
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.config.outside import escape_control_characters

Unit = Literal["bytes", "steps", "share"]
"""What follows a bar: bytes and their speed, finished and total steps, or per cent."""
REFRESHES_PER_SECOND = 4


def open_screen() -> Console:
    """Return a console on standard error. FORCE_COLOR, which CI services set, does not make a terminal of a file or pipe."""
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


class _NameColumn(TextColumn):
    """Shows text as it is: names are no markup, and control characters are escaped."""

    def render(self, task: columns.Task) -> Text:
        return Text(escape_control_characters(self.text_format.format(task=task), one_line=True), self.style)


class _SpeedColumn(columns.ProgressColumn):
    def render(self, task: columns.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{format_bytes(speed)}/s" if speed else "?", "progress.data.speed")


@contextmanager
def progress_bar(description: str, total: float | int, unit: Unit = "share") -> Iterator[Callable[[float | int], None]]:
    """Show a bar while the block runs; the yielded function advances it by a part of the total."""
    screen = open_screen()
    with progress_display(screen, unit, transient=True, disable=not screen.is_interactive) as found:
        yield add_task(found, description, total)


def progress_display(screen: Console, unit: Unit, *, transient: bool = False, disable: bool = False) -> Progress:
    """Return a context for the bars of `add_task`.

    At the end the bars stay, unless `transient`. A console that is not a terminal gets them once, at the end, unless `disable`.
    """
    numbers: dict[Unit, tuple[str | columns.ProgressColumn, ...]] = {
        "bytes": (columns.DownloadColumn(binary_units=True), _SpeedColumn()),
        "steps": (columns.MofNCompleteColumn(), "steps"),
        "share": (columns.TaskProgressColumn(),),
    }
    shown = (_NameColumn("{task.description}"), BarColumn(), *numbers[unit], columns.TimeRemainingColumn())
    return Progress(*shown, console=screen, transient=transient, disable=disable)


def add_task(found: Progress, what: str, total: float | int) -> Callable[[float | int], None]:
    """Add a bar; the returned function advances it by a part of the total."""
    task = found.add_task(what, total=total)
    return lambda done: found.advance(task, done)


def start_wide_bar(screen: Console, what: str, total: float | int, *, completed: int = 0, words: str = "") -> Progress:
    """Start one bar over the whole width; `update` changes its description and the `words` after it."""
    shown = (_NameColumn("{task.description}", "bold"), BarColumn(bar_width=None), _NameColumn("{task.fields[words]}"))
    found = Progress(*shown, console=screen, expand=True, refresh_per_second=REFRESHES_PER_SECOND)
    found.add_task(what, total=total, completed=completed, words=words)
    found.start()
    return found
