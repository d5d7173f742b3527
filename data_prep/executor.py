"""Items of work done by processes of this machine, in any order, each once, with progress.

Not datatrove's local executor: it waits for ever for a worker that the system has killed, for memory say.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError

POLL_SECONDS = 0.2
"""How often the bar moves."""

Advance = Callable[[int], None]
Do = Callable[[Any, Advance], Any]
"""Does one item, telling how much of it is done as it goes; may return something for `take`."""


class Stopped(Exception):
    """Raised by `Advance` inside an item, in a worker: nobody waits for it any longer."""


def run(
    start: Callable[[], Do],
    items: Sequence[Any],
    workers: int,
    advance: Advance,
    take: Callable[[Any], None] | None = None,
) -> None:
    """Every item is done. `start` is called once in each worker, and what it returns for each item there. `take` is given,
    in this process, what that returns, in any order.

    Raises: whatever the first failing item raised, or KeyboardInterrupt, after which no further item is begun, and those
    that were end with their next word of progress.
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
    # Neither is read here under a lock: a killed worker may have held it.
    done, stopped = context.Value("q", 0), context.RawValue("b", 0)
    try:
        with _interrupted() as interrupted, _pool(context, min(workers, len(items)), start, done, stopped) as pool:
            waiting = _submitted(pool, items)
            shown = 0
            while waiting:
                finished, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                told = done.get_obj().value
                advance(told - shown)
                shown = told
                for future in finished:
                    if not isinstance(future.exception(), Stopped):  # else another has failed, and is waited for
                        take(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"--workers: one of {workers} was killed, most likely for memory; "
            "run the same command again, with fewer workers"
        ) from None


def _submitted(pool: ProcessPoolExecutor, items: Sequence[Any]) -> set[Future[Any]]:
    with _deaf():  # a new process, which inherits that, would end in a traceback
        try:
            return {pool.submit(_do, item) for item in items}
        # A worker was killed as another began: concurrent.futures has closed what that one needs, or memory is short.
        except (OSError, ValueError) as error:
            raise BrokenProcessPool(str(error)) from error


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C within the block, which then ends with KeyboardInterrupt; what a second does is what it did
    before.

    An exception out of the blue would leave locks of concurrent.futures taken, which its thread then waits for for ever.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # nor is Ctrl-C told to this one
        yield noted
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
    if noted.is_set():  # while the last items ended
        raise KeyboardInterrupt


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C comes after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _pool(
    context: Any, workers: int, start: Callable[[], Do], done: Any, stopped: Any
) -> Iterator[ProcessPoolExecutor]:
    # `start` in a file: what a new process is told goes through a pipe, and if that is full and the process is killed
    # before it has read, multiprocessing waits for ever.
    with tempfile.NamedTemporaryFile() as told:
        told.write(pickle.dumps(start))
        told.flush()
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, context, _start, (told.name, done, stopped))
        try:
            yield pool
        except BrokenProcessPool:
            # The pool has ended its workers, but overlooks one that began meanwhile, and waits for that for ever.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        finally:
            stopped.value = 1
            pool.shutdown(cancel_futures=True)


_worker: tuple[Do | Exception, Any, Any]
"""What `start` returned in this process, or why it did not."""


def _start(told: str, done: Any, stopped: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do = pickle.loads(Path(told).read_bytes())()
    except Exception as error:  # told by the first item: of an error here the pool says only that a process is gone
        do = error
    _worker = (do, done, stopped)


def _end_with_parent() -> None:
    # A killed parent cannot close the queue its workers wait on; they would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _do(item: Any) -> Any:
    do, done, stopped = _worker

    def advance(count: int) -> None:
        if stopped.value:
            raise Stopped
        with done.get_lock():
            done.value += count

    advance(0)
    try:
        if isinstance(do, Exception):
            raise do
        return do(item, advance)
    except BaseException:
        stopped.value = 1
        raise
