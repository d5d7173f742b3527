"""Items of work done by processes of this machine, in any order, each once, with progress.

Not datatrove's local executor: it waits for ever for a worker that the system has killed, for memory say.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any

from trainer.config import UserError

POLL_SECONDS = 0.2
"""How often the bar moves."""

Advance = Callable[[int], None]
Do = Callable[[Any, Advance], Any]
"""Does one item, telling how much of it is done as it goes; may return something for `take`."""


class Stopped(Exception):
    """Raised by `Advance` inside an item, in a worker: nobody waits for it any longer."""


def run(
    start: Callable[[], Do], items: Sequence[Any], workers: int, advance: Advance, take: Callable[[Any], None] | None = None
) -> None:
    """Every item is done. `start` is called once in each worker, and what it returns for each item there. `take` is given,
    in this process, what that returns, in any order.

    Raises: whatever the first failing item raised, after which no further item is begun, and those that were end with
    their next word of progress.
    """
    take = take or (lambda result: None)
    if not items:
        return
    if workers == 1 or len(items) == 1:
        do = start()
        for item in items:
            take(do(item, advance))
        return
    context = multiprocessing.get_context("spawn")
    done, stopped = context.Value("q", 0), context.Event()
    # In a file: what a new process is told goes through a pipe, and where that is full because the process was killed
    # before it read, multiprocessing waits for ever.
    with tempfile.NamedTemporaryFile() as told:
        told.write(pickle.dumps(start))
        told.flush()
        pool = ProcessPoolExecutor(min(workers, len(items)), context, _start, (told.name, done, stopped))
        _hand_out(pool, items, ...)
    try:
        waiting = {pool.submit(_do, item) for item in items}
        shown = 0
        while waiting:
            finished, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
            advance(done.value - shown)
            shown = done.value
            for future in finished:
                take(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"--workers: one of {workers} was killed, most likely for memory; finished work is kept; "
            "run the same command again, with fewer workers"
        ) from None
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


_worker: tuple[Do, Synchronized[int], Event]


def _start(start: Callable[[], Do], done: Synchronized[int], stopped: Event) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (start(), done, stopped)


def _end_with_parent() -> None:
    # A killed parent cannot close the queue its workers wait on; they would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _do(item: Any) -> Any:
    do, done, stopped = _worker

    def advance(count: int) -> None:
        if stopped.is_set():
            raise Stopped
        with done.get_lock():
            done.value += count

    return do(item, advance)
