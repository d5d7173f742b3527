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

ProgressCallback = Callable[[int], None]
ItemFunction = Callable[[Any, ProgressCallback], Any]
"""Does one item, telling how much of it is done as it goes; may return something for `on_result`."""


class ItemCancelled(Exception):
    """Raised by `ProgressCallback` inside an item, in a worker: nobody waits for it any longer."""


def run(
    make_item_function: Callable[[], ItemFunction],
    items: Sequence[Any],
    workers: int,
    advance: ProgressCallback,
    on_result: Callable[[Any], None] | None = None,
) -> None:
    """Every item is done. `make_item_function` is called once in each worker, and what it returns for each item there.
    `on_result` is given, in this process, what that returns, in any order.

    Raises: whatever the first failing item raised, or KeyboardInterrupt, after which no further item is begun, and those
    that were end with their next word of progress.
    """
    on_result = on_result or (lambda result: None)
    if not items:
        return
    if workers == 1 or len(items) == 1:
        run_item = make_item_function()
        for item in items:
            on_result(run_item(item, advance))
        return
    context = multiprocessing.get_context("spawn")
    # Neither is read here under a lock: a killed worker may have held it.
    progress_counter, cancel_flag = context.Value("q", 0), context.RawValue("b", 0)
    try:
        with (
            _catch_interrupt() as interrupted,
            _worker_pool(context, min(workers, len(items)), make_item_function, progress_counter, cancel_flag) as pool,
        ):
            pending = _submit_items(pool, items)
            reported_done = 0
            while pending:
                finished, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                total_done = progress_counter.get_obj().value
                advance(total_done - reported_done)
                reported_done = total_done
                for future in finished:
                    if not isinstance(future.exception(), ItemCancelled):  # else another has failed, and is waited for
                        on_result(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"--workers: one of {workers} was killed, most likely for memory; "
            "run the same command again, with fewer workers"
        ) from None


def _submit_items(pool: ProcessPoolExecutor, items: Sequence[Any]) -> set[Future[Any]]:
    with _block_interrupt():  # a new process, which inherits that, would end in a traceback
        try:
            return {pool.submit(_run_item, item) for item in items}
        # A worker was killed as another began: concurrent.futures has closed what that one needs, or memory is short.
        except (OSError, ValueError) as error:
            raise BrokenProcessPool(str(error)) from error


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C within the block, which then ends with KeyboardInterrupt; what a second does is what it did
    before.

    An exception out of the blue would leave locks of concurrent.futures taken, which its thread then waits for for ever.
    """
    interrupt_event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # nor is Ctrl-C told to this one
        yield interrupt_event
        return
    previous_handler = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        interrupt_event.set()
        signal.signal(signal.SIGINT, previous_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt_event
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if interrupt_event.is_set():  # while the last items ended
        raise KeyboardInterrupt


@contextmanager
def _block_interrupt() -> Iterator[None]:
    """Ctrl-C comes after the block."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


@contextmanager
def _worker_pool(
    context: Any, workers: int, make_item_function: Callable[[], ItemFunction], progress_counter: Any, cancel_flag: Any
) -> Iterator[ProcessPoolExecutor]:
    # `make_item_function` in a file: what a new process is told goes through a pipe, and if that is full and the process
    # is killed
    # before it has read, multiprocessing waits for ever.
    with tempfile.NamedTemporaryFile() as function_file:
        function_file.write(pickle.dumps(make_item_function))
        function_file.flush()
        existing_processes = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, context, _init_worker, (function_file.name, progress_counter, cancel_flag))
        try:
            yield pool
        except BrokenProcessPool:
            # The pool has ended its workers, but overlooks one that began meanwhile, and waits for that for ever.
            for process in set(multiprocessing.active_children()) - existing_processes:
                process.kill()
            raise
        finally:
            cancel_flag.value = 1
            pool.shutdown(cancel_futures=True)


_worker_state: tuple[ItemFunction | Exception, Any, Any]
"""What `make_item_function` returned in this process, or why it did not."""


def _init_worker(function_path: str, progress_counter: Any, cancel_flag: Any) -> None:
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        run_item = pickle.loads(Path(function_path).read_bytes())()
    except Exception as error:  # told by the first item: of an error here the pool says only that a process is gone
        run_item = error
    _worker_state = (run_item, progress_counter, cancel_flag)


def _exit_with_parent() -> None:
    # A killed parent cannot close the queue its workers wait on; they would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _run_item(item: Any) -> Any:
    item_function, progress_counter, cancel_flag = _worker_state

    def advance(count: int) -> None:
        if cancel_flag.value:
            raise ItemCancelled
        with progress_counter.get_lock():
            progress_counter.value += count

    advance(0)
    try:
        if isinstance(item_function, Exception):
            raise item_function
        return item_function(item, advance)
    except BaseException:
        cancel_flag.value = 1
        raise
