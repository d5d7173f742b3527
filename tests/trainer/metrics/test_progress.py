"""Progress bars appear on a terminal and nowhere else."""

import contextlib
import io
import pty
import sys

import pytest
from rich.console import Console

from tandem.trainer.metrics import progress


@contextlib.contextmanager
def terminal(monkeypatch):
    """Make standard error a terminal while the block runs; the yielded list then has the text written to it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    ours, theirs = pty.openpty()
    written = []
    with open(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        yield written
        monkeypatch.undo()
    with open(ours, "rb", buffering=0) as end, contextlib.suppress(OSError):  # Linux ends a terminal with EIO
        while part := end.read(1 << 16):
            written.append(part.decode())


@pytest.mark.parametrize(
    ("unit", "words"), [("bytes", ["2.9/2.9 MiB"]), ("steps", ["3000000/3000000", "steps"]), ("share", ["100%"])]
)
def test_a_terminal_gets_a_bar_that_moves_and_goes(unit, words, monkeypatch):
    with terminal(monkeypatch) as written, progress.progress_bar("reading", 3_000_000, unit) as advance:
        advance(1_000_000)
        advance(2_000_000)
    last = "".join(written).rpartition("reading")[2]
    assert [word for word in words if word not in last] == []
    assert last.endswith("\x1b[1A\x1b[2K"), "its line is empty again"


@pytest.mark.parametrize("term", [None, "colour forced, as on CI", "dumb"])
def test_what_cannot_show_a_bar_gets_nothing(term, monkeypatch, capfd):
    if term != "dumb":
        if term:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("TERM", "xterm")
        with progress.progress_bar("reading", 3, "bytes") as advance:
            advance(3)
        assert capfd.readouterr() == ("", "")
        return
    with terminal(monkeypatch) as written:
        monkeypatch.setenv("TERM", term)
        with progress.progress_bar("reading", 3, "bytes") as advance:
            advance(3)
    assert written == []


def test_bars_that_stay_are_in_a_file_once_when_all_is_done():
    screen = Console(file=io.StringIO(), width=100)
    with progress.progress_display(screen, "share") as bars:
        first, second = (progress.add_task(bars, name, 4) for name in ("encoding", "shuffling"))
        first(4)
        second(1)
        second(1)
        assert screen.file.getvalue() == ""
    first, second = screen.file.getvalue().splitlines()[:2]
    assert first.startswith("encoding ")
    assert "100%" in first
    assert second.startswith("shuffling ")
    assert " 50%" in second
