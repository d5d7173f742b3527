"""Saving behind the training: the state is copied to host memory, and a thread writes the copy while the next steps are made.

The one idea: weights and moments change in the update alone, so the copy is made beside the forward and backward passes, and
only an update that comes too early waits for it. There is one copy, kept for the next save, and one save at a time: a save
that is due before the last one has been written waits. Ranks tell one another what they have written through the launch's
store, never through a collective, which would get among those of the training.
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
from tandem.trainer.checkpoint.write import RankFragments, WrittenFile
from tandem.trainer.config import UserError
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, broadcast_from_rank_0, create_shared_store
from tandem.trainer.distributed.watchdog import is_connection_lost

T = TypeVar("T")
EXIT_WAIT_SECONDS = 20.0
WRITE_TIMEOUT = timedelta(hours=2)
"""Ranks wait so long for the slowest one's file."""
RESTART_HINT = "and start again: the run goes on from the checkpoint before"


@dataclass(frozen=True)
class SaveResult:
    """How a save has ended."""

    step: int
    error: str | None
    """Why there is no such checkpoint; None: it is committed."""
    seconds: float
    """From the decision to save to the commit."""
    num_bytes: int = 0


class CheckpointSaver:
    """Saves into `root`, where it keeps the newest `keep_last` checkpoints (0: all). All ranks make one, and call it alike."""

    def __init__(self, root: Path, mesh: Mesh, keep_last: int) -> None:
        self._stall_seconds = 0.0
        self._root, self._mesh, self._keep_last = root, mesh, keep_last
        self._store = create_shared_store("checkpoint")
        self._store.set_timeout(WRITE_TIMEOUT)
        self._host_copies: list[Tensor] = []
        self._copy_stream = torch.cuda.Stream() if mesh.device.type == "cuda" else None
        self._save_index = 0
        self._pending_result: Future[SaveResult] | None = None
        self._write_finished = Event()

    def start_save(
        self, step: int, engine: Engine, metadata: dict[str, Any], before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """A checkpoint of `step` is under way; the engine holds its state until that is copied.

        `metadata` (model, cursor, fingerprints ...) are stored as rank 0 gives them; `before_commit` is called there once all
        files are written.
        """
        assert self._pending_result is None, "the last save's outcome has not been asked for"
        start_time, self._save_index = time.perf_counter(), self._save_index + 1
        folder = self._root / step_folder_name(step)
        error = broadcast_from_rank_0(
            os_error_message(partial(write.prepare_folder, folder)) if self._mesh.rank == 0 else None
        )
        if error:
            self._pending_result = Future()
            self._pending_result.set_result(SaveResult(step, error, time.perf_counter() - start_time))
            self._write_finished.set()
        else:
            share, copied = write.rank_fragments(engine, self._mesh), Event()
            self._write_finished.clear()
            # As they are now: the training goes on with what they were made of.
            metadata = deepcopy(
                {"step": step, "tp_size": self._mesh.tp_size, "dp_size": self._mesh.dp_size, **metadata}
            )
            ready = torch.cuda.current_stream().record_event() if self._copy_stream else None
            save = partial(
                self._run_save, folder, share, metadata, before_commit, self._save_index, start_time, ready, copied
            )
            self._pending_result = run_in_background(save)
            engine.block_updates_until(partial(self._timed_wait, copied.wait))
        self._stall_seconds += time.perf_counter() - start_time

    def pop_stall_seconds(self) -> float:
        """What the training has waited for saves since it was last asked."""
        found, self._stall_seconds = self._stall_seconds, 0.0
        return found

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """A save that is under way has had some time to end, unless a rank is gone that it would wait for."""
        if self._pending_result is not None and not (error and is_connection_lost(error)):
            concurrent.futures.wait([self._pending_result], EXIT_WAIT_SECONDS)

    @property
    def has_pending_save(self) -> bool:
        """Whether the outcome of a save has not been asked for yet."""
        return self._pending_result is not None

    @property
    def is_save_finished(self) -> bool:
        """Whether `wait_for_result` would not wait."""
        return self._pending_result is not None and self._pending_result.done()

    def wait_until_written(self) -> None:
        """This rank's file of the save that was begun last is on disk, or has failed."""
        self._timed_wait(self._write_finished.wait)

    def wait_for_result(self) -> SaveResult:
        """How the save that was begun last has ended, the same on every rank; waits for that."""
        assert self._pending_result is not None, "no save was begun"
        running, self._pending_result = self._pending_result, None
        return self._timed_wait(running.result)

    def _timed_wait(self, wait: Callable[[], T]) -> T:
        start_time = time.perf_counter()
        found = wait()
        self._stall_seconds += time.perf_counter() - start_time
        return found

    def _run_save(
        self,
        folder: Path,
        fragments: RankFragments,
        metadata: dict[str, Any],
        before_commit: Callable[[], object],
        save_index: int,
        start_time: float,
        ready: Any,
        copied: Event,
    ) -> SaveResult:
        """In the thread: returns once rank 0 has committed, or has given up."""
        if self._copy_stream:
            # A new thread is on the first device, and would make a context there.
            torch.cuda.set_device(self._mesh.device)
        store_prefix, rank = f"{save_index}/", self._mesh.rank
        try:
            try:
                fragments = self._copy_to_host(fragments, ready)
            finally:
                copied.set()
            table: WrittenFile = {}
            error = os_error_message(lambda: table.update(write.write_rank_file(folder, rank, fragments)))
            self._store.set(
                store_prefix + str(rank), json.dumps({"error": error and f"rank {rank}: {error}", "table": table})
            )
            self._write_finished.set()
            if rank == 0:
                outcome = self._commit(folder, metadata, before_commit, store_prefix, start_time)
                self._store.set(store_prefix + "outcome", json.dumps(vars(outcome)))
        except BaseException as crash:  # raised where the outcome is asked for; the other ranks would wait for this one
            message = f"rank {rank}: {type(crash).__name__}: {crash}"
            self._store.set(store_prefix + str(rank), json.dumps({"error": message, "table": {}}))
            if rank == 0:
                result = SaveResult(metadata["step"], message, time.perf_counter() - start_time)
                self._store.set(store_prefix + "outcome", json.dumps(vars(result)))
            raise
        finally:
            self._write_finished.set()
        return SaveResult(**json.loads(self._store.get(store_prefix + "outcome")))

    def _commit(
        self,
        folder: Path,
        metadata: dict[str, Any],
        before_commit: Callable[[], object],
        store_prefix: str,
        start_time: float,
    ) -> SaveResult:
        """On rank 0: waits for all ranks' files, then commits them and removes what is too old."""
        reports = [json.loads(self._store.get(store_prefix + str(rank))) for rank in range(self._mesh.world_size)]
        for rank in range(self._mesh.world_size):
            self._store.delete_key(store_prefix + str(rank))
        tables = [each["table"] for each in reports]
        error = next((each["error"] for each in reports if each["error"]), None)
        error = (
            error or os_error_message(before_commit) or os_error_message(lambda: write.commit(folder, tables, metadata))
        )
        if error:
            os_error_message(partial(write.remove_checkpoint, folder))  # gives back the room, for the next try
        else:
            write.prune(folder, self._keep_last)
        size = 0 if error else write.total_bytes(tables)
        return SaveResult(metadata["step"], error, time.perf_counter() - start_time, size)

    def _copy_to_host(self, fragments: RankFragments, ready: Any) -> RankFragments:
        """The same share in host memory, in buffers that are kept for the next save."""
        tensors = [tensor for _, kinds in fragments for tensor in kinds]
        if [copy.shape for copy in self._host_copies] != [tensor.shape for tensor in tensors]:
            self._host_copies.clear()  # before the new ones are made
            sizes = [tensor.numel() for tensor in tensors]
            # In one piece: torch rounds every pinned one up to a power of two.
            self._host_copies += torch.empty(sum(sizes), pin_memory=self._copy_stream is not None).split(sizes)
        with torch.no_grad(), torch.cuda.stream(self._copy_stream):
            if self._copy_stream:
                self._copy_stream.wait_event(ready)
            for copy, tensor in zip(self._host_copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if self._copy_stream:
                self._copy_stream.synchronize()
        copies = iter(self._host_copies)
        return [(entry, [next(copies) for _ in kinds]) for entry, kinds in fragments]


def save_checkpoint(
    root: Path, step: int, engine: Engine, mesh: Mesh, *, metadata: dict[str, Any], keep_last: int
) -> int:
    """A committed checkpoint of `step` lies in `root`; older ones beyond `keep_last` are gone. Returns its size in bytes.

    Raises: UserError where it cannot be written.
    """
    saver = CheckpointSaver(root, mesh, keep_last)
    saver.start_save(step, engine, metadata)
    outcome = saver.wait_for_result()
    if outcome.error:
        raise UserError(save_error_message(root, outcome, RESTART_HINT))
    return outcome.num_bytes


def save_error_message(root: Path, result: SaveResult, consequence: str) -> str:
    """In one line, what a person has to mend, and what comes of it then."""
    free_bytes = shutil.disk_usage(root).free if root.exists() else 0
    return (
        f"{root}: the checkpoint of step {result.step} cannot be written ({result.error}); {free_bytes / 1e9:.3g} GB are free "
        f"there; make room or make it writable {consequence}"
    )


def os_error_message(function: Callable[[], object]) -> str | None:
    """What the operating system had against the call, or None."""
    try:
        function()
    except OSError as error:
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def run_in_background(function: Callable[[], T]) -> Future[T]:
    """The result, or error, of a call in a thread that does not outlive the process: one stuck in a dead file system would."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future
