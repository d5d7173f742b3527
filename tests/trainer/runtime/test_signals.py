"""Signals, and how a library or a thread meets them."""

import os
import signal
import threading
import time
from contextlib import closing, suppress

import pytest

from tandem.trainer.runtime import signals
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until


def test_no_library_takes_a_signal_for_an_error_of_its_own():
    def library() -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with closing(signals.StopSignal()) as stop_signal:
        stop_signal.mark_rendezvous_done()
        with pytest.raises(signals.StopRequested), stop_signal.interruptible():
            library()


def test_a_signal_starts_no_thread(monkeypatch):
    """From Python 3.12 on an exiting process raises if it starts a thread, and a signal may arrive then."""
    others, start, started = threading.enumerate(), threading.Thread.start, []
    stop = signals.StopSignal()
    (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals" and thread not in others)

    def recorded(thread):
        if threading.current_thread() in (listener, threading.main_thread()):
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    monkeypatch.setattr(signals, "RENDEZVOUS_TIMEOUT_SECONDS", 2 * TEST_TIMEOUT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: stop.has_arrived)
    stop.close()
    listener.join()
    assert started == []
