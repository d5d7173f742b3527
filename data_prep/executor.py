"""Process items of work in processes of this machine: each item once, in any order, with progress.

Other pools were tried. datatrove's local executor waits forever for a worker that the system has killed. loky cannot pass the
shared progress counter to its workers, takes the same CPU time, and still needs the code for Ctrl-C and for a killed parent.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError

STATUS_BYTES = 4096
"""Size of the file in which a worker states what it reads. No path is longer."""
EXIT_SECONDS = 1.0
"""How long to wait for the exit codes of workers after one was killed."""
POLL_SECONDS = 0.2
"""Interval between updates of the progress bar."""

ProgressCallback = Callable[[int], None]
ItemFunction = Callable[[Any, ProgressCallback], Any]
"""Processes one item and reports progress. Its result is passed to `on_result`."""


class ItemCancelled(Exception):
    """Raised by `ProgressCallback` in a worker whose item is no longer needed."""


def run(
    make_item_function: Callable[[], ItemFunction], items: Sequence[Any], workers: int, advance: ProgressCallback,
    on_result: Callable[[Any], None] = lambda result: None,
) -> None:  # fmt: skip
    """Process all items. `make_item_function` is called once in each worker. The function that it returns is called for each
    item. `on_result` receives the results in this process, in any order.

    Raises: the error of the first item that fails, or KeyboardInterrupt. No further item then begins, and running items end
    when they next report progress.
    """
    if not items:
        return
    if workers == 1 or len(items) == 1:
        run_item = make_item_function()
        for item in items:
            on_result(run_item(item, advance))
        return
    context = multiprocessing.get_context("spawn")
    # Read without a lock, which a killed worker may still hold.
    progress_counter, cancel_flag = context.Value("q", 0), context.RawValue("b", 0)
    processes: list[Any] = []
    pool_arguments = min(workers, len(items)), make_item_function, progress_counter, cancel_flag, processes
    try:
        with _catch_interrupt() as interrupted, _worker_pool(context, *pool_arguments) as pool:
            pending = _submit_items(pool, items)
            processes += multiprocessing.active_children()
            reported_done = 0
            while pending:
                finished, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                if interrupted.is_set():
                    raise KeyboardInterrupt
                total_done = progress_counter.get_obj().value
                advance(total_done - reported_done)
                reported_done = total_done
                for future in finished:
                    if isinstance(future.exception(), ItemCancelled):
                        continue  # another item has failed, and its error is raised later
                    on_result(future.result())
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers: one of {workers} workers was killed{_describe_work(error)}, probably because memory ran out; "
            "run the same command again with fewer workers"
        ) from None


def note_file(name: str) -> None:
    """State which file this worker reads from now on. The message names it if the worker is killed."""
    if _status_fd is not None:
        os.pwrite(_status_fd, os.fsencode(name)[:STATUS_BYTES].ljust(STATUS_BYTES, b"\0"), 0)


def _describe_work(error: BrokenProcessPool) -> str:
    files = " or ".join(getattr(error, "__notes__", []))
    return files and f" while it read {files}"


def _submit_items(pool: ProcessPoolExecutor, items: Sequence[Any]) -> set[Future[Any]]:
    with _block_interrupt():  # otherwise Ctrl-C would end a process with a traceback while it starts
        try:
            return {pool.submit(_run_item, item) for item in items}
        # Either a worker was killed while another one started, so concurrent.futures has closed its pipes, or memory is short.
        except (OSError, ValueError) as error:
            raise BrokenProcessPool(str(error)) from error


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets. Raise KeyboardInterrupt at the end of the block. A second Ctrl-C acts as
    usual.

    If Ctrl-C raised an exception at an arbitrary point, locks of concurrent.futures could stay locked, and its thread would
    wait forever.
    """
    interrupt_event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives Ctrl-C
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
    if interrupt_event.is_set():  # Ctrl-C was pressed while the last items ended
        raise KeyboardInterrupt


@contextmanager
def _block_interrupt() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


@contextmanager
def _worker_pool(
    context: Any,
    workers: int,
    make_item_function: Callable[[], ItemFunction],
    progress_counter: Any,
    cancel_flag: Any,
    processes: list[Any],
) -> Iterator[ProcessPoolExecutor]:
    # `make_item_function` goes through a file. Arguments of a new process go through a pipe, and if the pipe is full and the
    # process is killed before it reads, multiprocessing waits forever.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "function").write_bytes(pickle.dumps(make_item_function))
        existing_processes = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, context, _init_worker, (folder, progress_counter, cancel_flag))
        try:
            yield pool
        except BrokenProcessPool as error:
            for name in _files_of_killed_workers(folder, processes):
                error.add_note(name)
            # The pool ends its workers but overlooks one that has just started, and would wait for it forever.
            for process in set(multiprocessing.active_children()) - existing_processes:
                process.kill()
            raise
        finally:
            cancel_flag.value = 1
            pool.shutdown(cancel_futures=True)


def _files_of_killed_workers(folder: str, processes: Sequence[Any]) -> Iterator[str]:
    """Yield the files that workers read when they were killed. The pool ends the other workers with SIGTERM."""
    deadline = time.monotonic() + EXIT_SECONDS
    # While the pool's own thread collects a process, its exit code is not known here.
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        path = Path(folder, str(process.pid))
        name = os.fsdecode(path.read_bytes().rstrip(b"\0")) if path.exists() else ""
        if name and process.exitcode not in (None, 0, -signal.SIGTERM):
            yield name


_status_fd: int | None = None
"""Where this worker states what it reads; None in other processes."""
_worker_state: tuple[ItemFunction | Exception, Any, Any]
"""The item function of this process or the error that prevented it, the progress counter, the cancel flag."""


def _init_worker(folder: str, progress_counter: Any, cancel_flag: Any) -> None:
    global _worker_state, _status_fd
    _status_fd = os.open(Path(folder, str(os.getpid())), os.O_WRONLY | os.O_CREAT, 0o600)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        run_item = pickle.loads(Path(folder, "function").read_bytes())()
    except Exception as error:
        run_item = error  # raised by the first item, because the pool reports an error here only as a lost process
    _worker_state = (run_item, progress_counter, cancel_flag)


def _exit_with_parent() -> None:
    # A killed parent cannot close the queue its workers wait on, so they would wait forever.
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
