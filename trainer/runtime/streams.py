"""Standard output and standard error that cannot end or hold up a program if the terminal, pipe or disk behind them fails.

No result depends on a view: the log, progress bars, and the standard output of a verb that writes files. A view never raises.
If nobody reads it, it waits once for STALL_SECONDS, then keeps up to MAX_PENDING_BYTES and drops the rest.
"""

import io
import os
import select
import signal
import stat
import sys
from contextlib import suppress
from typing import Any

from tandem.trainer.config import UserError

STALL_SECONDS = 1.0
"""Time that a view waits for a reader that has stopped reading, once for each stop."""
MAX_PENDING_BYTES = 1 << 16
CHUNK_BYTES = 4096
"""A pipe or terminal that `poll` reports as writable takes this much at once (PIPE_BUF on Linux)."""


class OutputClosed(BaseException):
    """The reader of a standard output that is not a view has exited. Not an Exception, so that rich does not handle it."""


class StandardStream(io.RawIOBase):
    """The file descriptor of a standard stream, which may be a view."""

    def __init__(self, descriptor: int, is_view: bool) -> None:
        self.is_view = is_view
        self._descriptor, self._pending, self._is_stalled = descriptor, bytearray(), False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        if not self.is_view:
            return self._write_result(data)
        self._pending += memoryview(data)[: MAX_PENDING_BYTES - len(self._pending)]
        try:
            while self._pending and self._wait_for_reader():
                del self._pending[: os.write(self._descriptor, self._pending[:CHUNK_BYTES])]
        except BlockingIOError:
            self._is_stalled = True
        except OSError:
            self._pending.clear()
        return len(data)

    def _write_result(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made the pipe or terminal non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                # Python writes the rest again when it exits.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)
                if isinstance(error, BrokenPipeError):
                    raise OutputClosed from None
                remedy = "free disk space or write to another place"
                raise UserError(f"standard output: cannot be written ({error.strerror}); {remedy}") from None

    def _wait_for_reader(self) -> bool:
        """Whether a write would not block now. If the reader has just stopped, wait for it once."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        self._is_stalled = not poll.poll(0 if self._is_stalled else 1000 * STALL_SECONDS)
        return not self._is_stalled


def protect_streams(*, stdout_is_view: bool) -> None:
    """Make standard error a view, and standard output too if `stdout_is_view`. Open /dev/null for a closed standard stream.

    Otherwise the next opened file would get the number of a closed stream, and what libraries print would go into that file.
    A stream that has already been replaced, for example by a test, stays as it is.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1, stdout_is_view)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2, is_view=True)
    if stdout_is_view:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # otherwise `stty tostop` stops a background program that prints


def _protected(stream: Any, original: Any, descriptor: int, is_view: bool) -> Any:
    if isinstance(raw := getattr(getattr(stream, "buffer", None), "raw", None), StandardStream):
        raw.is_view = is_view
        return stream
    if stream is not original:
        return stream
    if stream:
        with suppress(OSError):
            stream.flush()
    if is_view:
        _make_nonblocking(descriptor)
    line_buffering = is_view or stream is None or stream.line_buffering or stream.write_through
    # Errors: an encoding without some character must not end a run or lose the text.
    return io.TextIOWrapper(
        io.BufferedWriter(StandardStream(descriptor, is_view)), encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace", line_buffering=line_buffering,
    )  # fmt: skip


def _make_nonblocking(descriptor: int) -> None:
    """Open the pipe or terminal again, without blocking. The flag of the old opening is shared with other programs.

    Libraries that print in C, and child processes, then cannot block either. If this fails (a socket, another user's pipe),
    only `StandardStream` protects.
    """
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor):
        with suppress(OSError):
            opened = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(opened, descriptor)
            os.close(opened)
