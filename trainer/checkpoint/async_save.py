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
from tandem.trainer.checkpoint.layout import folder_name
from tandem.trainer.checkpoint.write import Share, Table
from tandem.trainer.config import UserError
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, from_rank_0, shared_store
from tandem.trainer.distributed.watchdog import connection_lost

T = TypeVar("T")
LONGEST_GOODBYE_SECONDS = 20.0
LONGEST_WRITE = timedelta(hours=2)
"""Ranks wait so long for the slowest one's file."""
START_AGAIN = "and start again: the run goes on from the checkpoint before"


@dataclass(frozen=True)
class Outcome:
    """How a save has ended."""

    step: int
    error: str | None
    """Why there is no such checkpoint; None: it is committed."""
    seconds: float
    """From the decision to save to the commit."""
    num_bytes: int = 0


class Saver:
    """Saves into `root`, where it keeps the newest `keep` checkpoints (0: all). All ranks make one, and call it alike."""

    def __init__(self, root: Path, mesh: Mesh, keep: int) -> None:
        self._stall_seconds = 0.0
        self._root, self._mesh, self._keep = root, mesh, keep
        self._store = shared_store("checkpoint")
        self._store.set_timeout(LONGEST_WRITE)
        self._copies: list[Tensor] = []
        self._stream = torch.cuda.Stream() if mesh.device.type == "cuda" else None
        self._number = 0
        self._running: Future[Outcome] | None = None
        self._written = Event()

    def begin(
        self, step: int, engine: Engine, facts: dict[str, Any], before_commit: Callable[[], object] = lambda: None
    ) -> None:
        """A checkpoint of `step` is under way; the engine holds its state until that is copied.

        `facts` (model, cursor, fingerprints ...) are stored as rank 0 gives them; `before_commit` is called there once all
        files are written.
        """
        assert self._running is None, "the last save's outcome has not been asked for"
        began, self._number = time.perf_counter(), self._number + 1
        folder = self._root / folder_name(step)
        error = from_rank_0(failure(partial(write.begin, folder)) if self._mesh.rank == 0 else None)
        if error:
            self._running = Future()
            self._running.set_result(Outcome(step, error, time.perf_counter() - began))
            self._written.set()
        else:
            share, copied = write.share_of(engine, self._mesh), Event()
            self._written.clear()
            # As they are now: the training goes on with what they were made of.
            facts = deepcopy({"step": step, "tp_size": self._mesh.tp_size, "dp_size": self._mesh.dp_size, **facts})
            ready = torch.cuda.current_stream().record_event() if self._stream else None
            save = partial(self._save, folder, share, facts, before_commit, self._number, began, ready, copied)
            self._running = in_background(save)
            engine.hold(partial(self._wait, copied.wait))
        self._stall_seconds += time.perf_counter() - began

    def take_stall_seconds(self) -> float:
        """What the training has waited for saves since it was last asked."""
        found, self._stall_seconds = self._stall_seconds, 0.0
        return found

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """A save that is under way has had some time to end, unless a rank is gone that it would wait for."""
        if self._running is not None and not (error and connection_lost(error)):
            concurrent.futures.wait([self._running], LONGEST_GOODBYE_SECONDS)

    @property
    def running(self) -> bool:
        """Whether the outcome of a save has not been asked for yet."""
        return self._running is not None

    @property
    def ended(self) -> bool:
        """Whether `outcome` would not wait."""
        return self._running is not None and self._running.done()

    def wait_until_written(self) -> None:
        """This rank's file of the save that was begun last is on disk, or has failed."""
        self._wait(self._written.wait)

    def outcome(self) -> Outcome:
        """How the save that was begun last has ended, the same on every rank; waits for that."""
        assert self._running is not None, "no save was begun"
        running, self._running = self._running, None
        return self._wait(running.result)

    def _wait(self, wait: Callable[[], T]) -> T:
        began = time.perf_counter()
        found = wait()
        self._stall_seconds += time.perf_counter() - began
        return found

    def _save(
        self, folder: Path, share: Share, facts: dict[str, Any], before_commit: Callable[[], object], number: int,
        began: float, ready: Any, copied: Event,
    ) -> Outcome:  # fmt: skip
        """In the thread: returns once rank 0 has committed, or has given up."""
        if self._stream:
            # A new thread is on the first device, and would make a context there.
            torch.cuda.set_device(self._mesh.device)
        told, rank = f"{number}/", self._mesh.rank
        try:
            try:
                share = self._copied(share, ready)
            finally:
                copied.set()
            table: Table = {}
            error = failure(lambda: table.update(write.write_share(folder, rank, share)))
            self._store.set(told + str(rank), json.dumps({"error": error and f"rank {rank}: {error}", "table": table}))
            self._written.set()
            if rank == 0:
                outcome = self._finish(folder, facts, before_commit, told, began)
                self._store.set(told + "outcome", json.dumps(vars(outcome)))
        except BaseException as crash:  # raised where the outcome is asked for; the other ranks would wait for this one
            words = f"rank {rank}: {type(crash).__name__}: {crash}"
            self._store.set(told + str(rank), json.dumps({"error": words, "table": {}}))
            if rank == 0:
                gone = Outcome(facts["step"], words, time.perf_counter() - began)
                self._store.set(told + "outcome", json.dumps(vars(gone)))
            raise
        finally:
            self._written.set()
        return Outcome(**json.loads(self._store.get(told + "outcome")))

    def _finish(
        self, folder: Path, facts: dict[str, Any], before_commit: Callable[[], object], told: str, began: float
    ) -> Outcome:
        """On rank 0: waits for all ranks' files, then commits them and removes what is too old."""
        said = [json.loads(self._store.get(told + str(rank))) for rank in range(self._mesh.world_size)]
        for rank in range(self._mesh.world_size):
            self._store.delete_key(told + str(rank))
        tables = [each["table"] for each in said]
        error = next((each["error"] for each in said if each["error"]), None)
        error = error or failure(before_commit) or failure(lambda: write.commit(folder, tables, facts))
        if error:
            failure(partial(write.remove, folder))  # gives back the room, for the next try
        else:
            write.retire(folder, self._keep)
        size = 0 if error else write.num_bytes(tables)
        return Outcome(facts["step"], error, time.perf_counter() - began, size)

    def _copied(self, share: Share, ready: Any) -> Share:
        """The same share in host memory, in buffers that are kept for the next save."""
        tensors = [tensor for _, kinds in share for tensor in kinds]
        if [copy.shape for copy in self._copies] != [tensor.shape for tensor in tensors]:
            self._copies.clear()  # before the new ones are made
            sizes = [tensor.numel() for tensor in tensors]
            # In one piece: torch rounds every pinned one up to a power of two.
            self._copies += torch.empty(sum(sizes), pin_memory=self._stream is not None).split(sizes)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            if self._stream:
                self._stream.wait_event(ready)
            for copy, tensor in zip(self._copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if self._stream:
                self._stream.synchronize()
        copies = iter(self._copies)
        return [(entry, [next(copies) for _ in kinds]) for entry, kinds in share]


def save(root: Path, step: int, engine: Engine, mesh: Mesh, *, facts: dict[str, Any], keep: int) -> int:
    """A committed checkpoint of `step` lies in `root`; older ones beyond `keep` are gone. Returns its size in bytes.

    Raises: UserError where it cannot be written.
    """
    saver = Saver(root, mesh, keep)
    saver.begin(step, engine, facts)
    outcome = saver.outcome()
    if outcome.error:
        raise UserError(not_saved(root, outcome, START_AGAIN))
    return outcome.num_bytes


def not_saved(root: Path, outcome: Outcome, then: str) -> str:
    """In one line, what a person has to mend, and what comes of it then."""
    room = shutil.disk_usage(root).free if root.exists() else 0
    return (
        f"{root}: the checkpoint of step {outcome.step} cannot be written ({outcome.error}); {room / 1e9:.3g} GB are free "
        f"there; make room or make it writable {then}"
    )


def failure(function: Callable[[], object]) -> str | None:
    """What the operating system had against the call, or None."""
    try:
        function()
    except OSError as error:
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def in_background(function: Callable[[], T]) -> Future[T]:
    """The result, or error, of a call in a thread that does not outlive the process: one stuck in a dead file system would."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=work, name="checkpoint", daemon=True).start()
    return future
