"""Runs a function on several ranks: processes of their own, gloo, a rendezvous file (no ports), a hard time limit.

A rank is a fork of a server that has imported everything (`forkserver_preload.py`) and done nothing: what a world does,
the next one cannot see. Several ranks still share a core or two, so let one `run` serve many assertions: the function
returns facts for all of them, a module-scoped fixture calls `run` (with `tmp_path_factory.mktemp`), and each test looks at
its own fact. The function stands at the top of its module; arguments and results can be pickled.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.timeouts import TEST_TIMEOUT_SECONDS

KERNEL_MODULES = [f"tandem.kernels.{file.stem}" for file in (Path(__file__).parents[1] / "kernels").glob("[!_]*.py")]
OWN_PACKAGES = ["tandem.trainer", "tandem.data_prep", *KERNEL_MODULES]
"""Without tandem.kernels.device: Triton wants its functions as they are written."""
GRACE_SECONDS = 5
"""After one rank has failed, the others have this long to tell their own story."""
FORKSERVER = multiprocessing.get_context("forkserver")
"""Starts with the first process that is asked of it, and ends when this process and all of its forks have."""
FORKSERVER.set_forkserver_preload(["tests.forkserver_preload"])


def check_annotations() -> None:
    """From here on every jaxtyping annotation of our packages is checked at each call."""
    import deepspeed  # noqa: F401
    from jaxtyping import install_import_hook

    import tandem.trainer.distributed.megatron  # noqa: F401  Both first: the hook compiles from source what our modules import.

    install_import_hook(OWN_PACKAGES, "beartype.beartype")


def run(
    function: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout_seconds: float = TEST_TIMEOUT_SECONDS,
) -> list[Any]:
    """What `function(*args)` returned on each rank, by rank, inside a gloo process group of `world_size`.

    The environment is this process's, with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; but what a library reads
    while it is imported the server has read when it began. Torch has one thread.
    Raises: AssertionError with the traceback of every rank that failed or hung. No process outlives the call.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    call = pickle.dumps((function, args))
    ranks = [_start_rank(_RankPlace(rank, world_size, folder), call) for rank in range(world_size)]
    try:
        _collect_results(ranks, time.monotonic() + timeout_seconds)
    finally:
        for rank in ranks:
            rank.terminate()
    failures = [rank.failure_message(timeout_seconds) for rank in ranks if not rank.succeeded]
    assert not failures, "\n".join(failures)
    return [rank.result for rank in ranks]


@dataclass(frozen=True)
class _RankPlace:
    rank: int
    world_size: int
    folder: Path

    @property
    def stack_path(self) -> Path:
        return self.folder / f"stack-{self.rank}.txt"


@dataclass
class _RankProcess:
    """The parent's view of one process."""

    place: _RankPlace
    process: BaseProcess
    receiver: Connection
    succeeded: bool = False
    result: Any = None
    traceback: str | None = None

    def receive(self) -> None:
        try:
            self.succeeded, answer = pickle.loads(self.receiver.recv_bytes())
        except EOFError:  # the process ended without a word
            return
        if self.succeeded:
            self.result = answer
        else:
            self.traceback = answer

    def terminate(self) -> None:
        """Afterwards the process is gone; if it had not answered, its stack is in the place's file."""
        if self.process.is_alive() and not self.succeeded and self.traceback is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.process.pid, signal.SIGUSR1)
                time.sleep(0.2)
        self.process.join(timeout=1)
        self.process.kill()
        self.process.join()
        self.receiver.close()

    def failure_message(self, timeout_seconds: float) -> str:
        if self.traceback is not None:
            return f"rank {self.place.rank} failed:\n{self.traceback}"
        stack = self.place.stack_path.read_text() if self.place.stack_path.exists() else ""
        return (
            f"rank {self.place.rank} gave no result (exit code {self.process.exitcode}, "
            f"limit {timeout_seconds:g} s) and was here:\n{stack or 'unknown'}"
        )


def _start_rank(place: _RankPlace, call: bytes) -> _RankProcess:
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_rank_main, args=(sender, place, dict(os.environ), call), daemon=False)
    process.start()
    sender.close()
    return _RankProcess(place, process, receiver)


def _collect_results(ranks: list[_RankProcess], deadline: float) -> None:
    waiting = {rank.receiver: rank for rank in ranks}
    while waiting and (remaining := deadline - time.monotonic()) > 0:
        for receiver in wait(list(waiting), remaining):
            rank = waiting.pop(receiver)
            rank.receive()
            if not rank.succeeded:  # the others may now wait for this one for ever
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _rank_main(sender: Connection, place: _RankPlace, environment: dict[str, str], call: bytes) -> None:
    faulthandler.register(signal.SIGUSR1, file=place.stack_path.open("w"), all_threads=False)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = (place.rank, place.world_size, place.rank, place.world_size)
    os.environ.clear()
    os.environ.update(environment, **dict(zip(names, map(str, values), strict=True)))
    try:
        answer = pickle.dumps((True, _run_in_process_group(place, call)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sys.stdout.flush()
    sys.stderr.flush()


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all ranks of this process group, of any type that can be pickled."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _run_in_process_group(place: _RankPlace, call: bytes) -> Any:
    import numpy
    import torch
    import torch.distributed as dist

    import tests.forkserver_preload  # noqa: F401  The server has, unless pytest was started outside the repository.

    # As in a process of its own: what is drawn without a seed is another thing on each rank.
    torch.seed()
    numpy.random.seed()
    function, args = pickle.loads(call)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.folder / 'rendezvous'}",
        rank=place.rank,
        world_size=place.world_size,
    )
    result = function(*args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result
