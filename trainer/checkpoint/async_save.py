"""Save checkpoints in the background: copy the state to host memory, then write it in a thread while training continues.

Only an update changes weights and moments. The copy can therefore overlap forward and backward. An update that is reached
before the copy is complete waits for the copy. All saves use the same host memory, so only one can run at a time. Ranks report
their files through the shared key-value store, because a collective in the thread would interleave with the main thread's.
"""

import concurrent.futures
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from tandem.trainer.checkpoint import write
from tandem.trainer.checkpoint.layout import step_folder_name
from tandem.trainer.checkpoint.write import WrittenFile
from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, broadcast_from_rank_0, create_shared_store
from tandem.trainer.distributed.watchdog import is_connection_lost

T = TypeVar("T")
EXIT_WAIT_SECONDS = 20.0
WRITE_TIMEOUT = timedelta(hours=2)
"""Longest wait for another rank's file."""
RESTART_HINT = "and start again: the run continues from the previous checkpoint"


@dataclass(frozen=True)
class SaveResult:
    step: int
    error: str | None
    """Why the save failed; None if the checkpoint is committed."""
    seconds: float
    """Time from the start of the save to the commit."""
    num_bytes: int = 0


@dataclass(frozen=True)
class _Save:
    folder: Path
    metadata: dict[str, Any]
    before_commit: Callable[[], object]
    store_prefix: str
    start_time: float

    def result(self, error: str | None, num_bytes: int = 0) -> SaveResult:
        return SaveResult(self.metadata["step"], error, time.perf_counter() - self.start_time, num_bytes)


class CheckpointSaver:
    """Saves checkpoints into `root` and keeps the newest `keep_last` (0: all). All ranks must make the same calls."""

    def __init__(self, root: Path, mesh: Mesh, keep_last: int) -> None:
        self._root, self._mesh, self._keep_last = root, mesh, keep_last
        self._store = create_shared_store("checkpoint")
        self._store.set_timeout(WRITE_TIMEOUT)
        self._host_copies: list[Tensor] = []
        self._copy_stream = torch.cuda.Stream() if mesh.device.type == "cuda" else None
        self._save_index, self._stall_seconds = 0, 0.0
        self.pending_result: Future[SaveResult] | None = None
        """The result of the last save until it is collected, otherwise None."""
        self._write_finished = Event()

    def start_save(
        self, step: int, engine: Engine, metadata: dict[str, Any], before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """Start a save of `step`. The engine's next update waits until the state is copied.

        `metadata` (model, cursor, fingerprints and so on) and `before_commit` are used only on rank 0, which calls
        `before_commit` after all files are written.
        """
        assert self.pending_result is None, "collect the previous save's result first"
        start_time, self._save_index = time.perf_counter(), self._save_index + 1
        # Training continues and changes the objects in `metadata`.
        metadata = deepcopy({"step": step, "tp_size": self._mesh.tp_size, "dp_size": self._mesh.dp_size, **metadata})
        folder = self._root / step_folder_name(step)
        save = _Save(folder, metadata, before_commit, f"{self._save_index}/", start_time)
        error = os_error_message(partial(write.prepare_folder, folder)) if self._mesh.rank == 0 else None
        if error := broadcast_from_rank_0(error):
            self.pending_result = Future()
            self.pending_result.set_result(save.result(error))
            self._write_finished.set()
        else:
            (entries, tensors), copied = write.rank_fragments(engine, self._mesh), Event()
            self._write_finished.clear()
            ready = torch.cuda.current_stream().record_event() if self._copy_stream else None
            self.pending_result = run_in_background(partial(self._run_save, save, entries, tensors, ready, copied))
            engine.wait_before_update = partial(self._timed_wait, copied.wait)
        self._stall_seconds += time.perf_counter() - start_time

    def pop_stall_seconds(self) -> float:
        """Return how long the training has waited for saves since the last call."""
        found, self._stall_seconds = self._stall_seconds, 0.0
        return found

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Give a running save some time to finish, unless it would wait for a rank that has been lost."""
        if self.pending_result and not (error and is_connection_lost(error)):
            concurrent.futures.wait([self.pending_result], EXIT_WAIT_SECONDS)

    def wait_until_written(self) -> None:
        """Wait until this rank's file is on disk or could not be written."""
        self._timed_wait(self._write_finished.wait)

    def wait_for_result(self) -> SaveResult:
        """Wait for the end of the save and return its result, which is the same on every rank."""
        assert self.pending_result, "no save was started"
        running, self.pending_result = self.pending_result, None
        return self._timed_wait(running.result)

    def _timed_wait(self, wait: Callable[[], T]) -> T:
        start_time = time.perf_counter()
        found = wait()
        self._stall_seconds += time.perf_counter() - start_time
        return found

    def _run_save(
        self, save: _Save, entries: list[dict[str, Any]], tensors: list[Tensor], ready: Any, copied: Event
    ) -> SaveResult:
        """Copy and write this rank's state, in the background thread. Return once rank 0 has committed the save or given up."""
        if self._copy_stream:
            # Otherwise the new thread would create a CUDA context on the first device.
            torch.cuda.set_device(self._mesh.device)
        rank = self._mesh.rank

        def report(error: str | None, table: WrittenFile) -> None:
            message = error and f"rank {rank}: {error}"
            self._store.set(f"{save.store_prefix}{rank}", json.dumps({"error": message, "table": table}))

        def share_result(result: SaveResult) -> None:
            self._store.set(save.store_prefix + "outcome", json.dumps(vars(result)))

        try:
            copies = self._copy_to_host(tensors, ready)
            copied.set()
            table: WrittenFile = {}
            error = os_error_message(lambda: table.update(write.write_rank_file(save.folder, rank, entries, copies)))
            report(error, table)
            self._write_finished.set()
            if rank == 0:
                share_result(self._commit(save))
        except BaseException as crash:  # `wait_for_result` raises it; the report ends the other ranks' wait
            copied.set()
            message = f"{type(crash).__name__}: {crash}"
            report(message, {})
            if rank == 0:
                share_result(save.result(f"rank 0: {message}"))
            raise
        finally:
            self._write_finished.set()
        return SaveResult(**json.loads(self._store.get(save.store_prefix + "outcome")))

    def _commit(self, save: _Save) -> SaveResult:
        """On rank 0: wait for all ranks' files, commit them and remove old checkpoints."""
        keys = [f"{save.store_prefix}{rank}" for rank in range(self._mesh.world_size)]
        reports = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        tables = [each["table"] for each in reports]
        error = next((each["error"] for each in reports if each["error"]), None) or os_error_message(save.before_commit)
        error = error or os_error_message(lambda: write.commit(save.folder, tables, save.metadata))
        if error:
            os_error_message(partial(write.remove_checkpoint, save.folder))  # frees the space for the next try
            return save.result(error)
        write.prune(save.folder, self._keep_last)
        return save.result(None, write.total_bytes(tables))

    def _copy_to_host(self, tensors: list[Tensor], ready: Any) -> list[Tensor]:
        """Copy the tensors into host buffers, which the next save reuses."""
        if [copy.shape for copy in self._host_copies] != [tensor.shape for tensor in tensors]:
            self._host_copies.clear()  # free the old buffers first
            sizes = [tensor.numel() for tensor in tensors]
            # One allocation, because torch rounds each pinned allocation up to a power of two.
            self._host_copies += torch.empty(sum(sizes), pin_memory=self._copy_stream is not None).split(sizes)
        with torch.no_grad(), torch.cuda.stream(self._copy_stream):
            if self._copy_stream:
                self._copy_stream.wait_event(ready)
            for copy, tensor in zip(self._host_copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if self._copy_stream:
                self._copy_stream.synchronize()
        return self._host_copies


def save_error_message(root: Path, result: SaveResult, consequence: str) -> str:
    """Return one line that states what failed, what to fix, and what happens next."""
    free_bytes = shutil.disk_usage(root).free if root.exists() else 0
    return (
        f"{root}: the checkpoint of step {result.step} cannot be written ({result.error}); the disk has "
        f"{format_bytes(free_bytes)} left; free disk space or make the folder writable {consequence}"
    )


def os_error_message(function: Callable[[], object]) -> str | None:
    """Call the function; return the message of its OSError, or None if it succeeds."""
    try:
        function()
    except OSError as error:
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def run_in_background(function: Callable[[], T]) -> Future[T]:
    """Call the function in a daemon thread, so that a write stuck in a dead file system cannot keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # `future.result()` raises it
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
