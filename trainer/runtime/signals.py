"""Stop a run on a signal. A signal only sets a flag. Between two steps all ranks agree on whether to stop."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from tandem.trainer.runtime.process import force_exit

REQUEUE_EXIT_CODE = 85
"""A signal or a hang stopped the run. The same command continues it."""

STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU,
)  # fmt: skip
"""SIGHUP: the terminal was closed, or the connection to it was lost. SIGUSR2, SIGXCPU: a scheduler warns of a limit."""
INSISTING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""As a second signal, these end the process. The others may be accidents: a terminal is closed, or a launcher dies."""
SIGNAL_DEBOUNCE_SECONDS = 5.0
"""Signals within this time of one another count as one."""
RENDEZVOUS_TIMEOUT_SECONDS = 15.0
"""Time that the ranks have left to connect after a signal."""
REMOTE_STOP_SIGNAL = signal.SIGURG
"""A process sends itself this signal if another rank received a stop signal. By default, a process ignores it."""
REMOTE_STOP_NAME = "a signal to another rank"

T = TypeVar("T")


class StopRequested(BaseException):
    """The run stops on all ranks, because one of them received a signal.

    Like KeyboardInterrupt, it is not an Exception, because it may be raised inside a library that catches every Exception.
    """


def reset_inherited_signals() -> None:
    """Undo what a parent process may leave: blocked signals, or an ignored SIGCHLD, which hides the exit codes of children."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def heeded_signals() -> list[signal.Signals]:
    """Return the signals that stop this process: all stop signals, but not SIGHUP if nohup started the process."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def is_insisting(number: int, first_signal_time: float) -> bool:
    """Whether a signal after the first one must end the process immediately."""
    return number in INSISTING_SIGNALS and time.monotonic() - first_signal_time >= SIGNAL_DEBOUNCE_SECONDS


class StopSignal:
    """Records a stop signal. A second one, if it insists, ends the process immediately. SIGHUP stays ignored under nohup.

    A signal to a whole process group arrives twice, directly and forwarded by torchrun, so signals that arrive within
    SIGNAL_DEBOUNCE_SECONDS count as one. If the ranks have not connected RENDEZVOUS_TIMEOUT_SECONDS after the first signal, the
    process exits with REQUEUE_EXIT_CODE, because there is nothing to save yet.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.has_arrived = False
        """Whether a signal has arrived, even if the main thread is in a collective and cannot run the handler."""
        self._last_signal_time: float | None = None
        self._is_interruptible = False
        self._rendezvous_done = threading.Event()
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in heeded_signals()}
        self._previous_handlers[REMOTE_STOP_SIGNAL] = signal.signal(REMOTE_STOP_SIGNAL, self._on_remote_stop)
        # Python runs a handler between two instructions of the main thread, which may hang in a collective forever. On a signal
        # the interpreter also writes to this socket. A thread reads it, so a second signal ends even a hanging process.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._wakeup_sender = sender
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch_signals, args=(receiver,), name="signals", daemon=True).start()

    def mark_rendezvous_done(self) -> None:
        """Record that all ranks are connected, so they can agree on when to stop."""
        self._rendezvous_done.set()

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._wakeup_sender.close()  # ends the thread

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise StopRequested inside the block when a signal arrives, or at once if one already has. Main thread only."""
        self._is_interruptible = True
        try:
            if self.signal_name is not None:
                raise StopRequested
            yield
        finally:
            self._is_interruptible = False

    def iterate_until_stop(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items until a signal arrives, which also interrupts the wait for the next item."""
        iterator = iter(items)
        with suppress(StopRequested):
            while True:
                with self.interruptible():
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item

    def trigger_remote_stop(self) -> None:
        """Stop, because another rank received a signal. A later signal to this rank counts as its first. Thread-safe."""
        signal.pthread_kill(threading.main_thread().ident or 0, REMOTE_STOP_SIGNAL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._last_signal_time is not None:
            if not is_insisting(number, self._last_signal_time):
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_name, self._last_signal_time = signal.Signals(number).name, time.monotonic()
        self._raise_if_interruptible()

    def _on_remote_stop(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or REMOTE_STOP_NAME
        self._raise_if_interruptible()

    def _raise_if_interruptible(self) -> None:
        if self._is_interruptible:
            self._is_interruptible = False  # raise once: the handling of StopRequested must not be interrupted
            raise StopRequested

    def _watch_signals(self, receiver: socket.socket) -> None:
        """End the process if the main thread does not handle a second signal, or if the ranks do not connect after a first one.

        This starts no further threads, because from Python 3.12 on an exiting process raises for each new one.
        """
        first_signal_time = None
        with receiver:
            while True:
                timeout_seconds = None
                if first_signal_time is not None and not self._rendezvous_done.is_set():
                    elapsed_seconds = time.monotonic() - first_signal_time
                    timeout_seconds = max(RENDEZVOUS_TIMEOUT_SECONDS - elapsed_seconds, 0.01)
                receiver.settimeout(timeout_seconds)
                try:
                    number = receiver.recv(1)
                except TimeoutError:
                    if not self._rendezvous_done.is_set():
                        force_exit(REQUEUE_EXIT_CODE)
                    continue
                if not number:
                    return
                if number[0] not in STOP_SIGNALS:
                    continue
                if first_signal_time is None:
                    first_signal_time, self.has_arrived = time.monotonic(), True
                elif is_insisting(number[0], first_signal_time):
                    time.sleep(1)  # give the handler time to end the process with the signal itself
                    os._exit(128 + number[0])
