"""The process: launch environment, GPUs, logging by rank, determinism and signals. Nothing here depends on what is trained.

A signal only sets a flag. Between two steps all ranks agree on whether to stop.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

REQUEUE_EXIT_CODE = 85
"""A signal or a hang stopped the run. The same command continues it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNAL_DEBOUNCE_SECONDS = 5.0
"""Signals within this time of one another count as one."""
RENDEZVOUS_TIMEOUT_SECONDS = 15.0
"""Time that the ranks have left to connect after a signal."""
REMOTE_STOP_SIGNAL = signal.SIGURG
"""A process sends itself this signal if another rank received a stop signal. By default, a process ignores it."""
REMOTE_STOP_NAME = "a signal to another rank"

PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class CurrentStderr:
    """Looks up sys.stderr at each write, because a progress bar may have replaced it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def start_logging(rank: int) -> None:
    """Log to stderr, from INFO up on rank 0 and from WARNING up on other ranks."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(CurrentStderr())
    faulthandler.enable(2)  # print a traceback on a segmentation fault or bus error
    logging.basicConfig(level=level, format=f"[rank {rank}] %(message)s", handlers=[handler], force=True)
    for noisy in ("megatron", "torch.distributed", "wandb", "DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def silence_library_warnings() -> None:
    """Suppress warnings about optional packages and deprecations from libraries that are imported after this call."""
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\b.*")
    if not num_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it falls back to the CPU
        # A CUDA build of torch warns on a machine with a CUDA compiler but no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def num_gpus(root: Path = Path("/")) -> int:
    """Count this machine's visible NVIDIA GPUs by their files below `root`, without importing torch.

    GPUs that a container is not allowed to open are counted too. Some sandboxes have device files but nothing in /proc. WSL has
    a single /dev/dxg for all GPUs, which counts as one.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return len(list(takewhile(lambda name: name and not name.startswith("-"), names)))  # CUDA stops at -1 as well
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*"):
        if found := list(root.glob(pattern)):
            return len(found)
    return int(any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg")))


def make_deterministic() -> None:
    """Make torch raise for operations whose result may differ between two identical runs."""
    import torch

    # cuBLAS reads this when its handle is created. torch requires it for deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The mode also fills new memory, to expose reads of uninitialized values. For a small model that costs more than a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def launch_environment() -> dict[str, int]:
    """Return rank, world_size and local_rank from torchrun, deepspeed or srun, or 0, 1 and 0 without a launcher."""
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
    defaults = {"rank": 0, "world_size": 1, "local_rank": 0}
    return {key: int(os.environ.get(name, defaults[key])) for key, name in names.items()}


def max_local_world_size() -> int:
    """Return the largest number of ranks that this launch has on one machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # torchrun, deepspeed, srun
        if given := os.environ.get(name):
            return max(int(nodes.split("(")[0]) for nodes in given.split(","))  # Slurm writes 8(x2),4
    return int(os.environ.get("WORLD_SIZE", 1))


def set_parent_death_signal() -> None:
    """Send this rank SIGTERM if the launcher that started it dies, so that no rank outlives its launcher."""
    if "RANK" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


class StopRequested(BaseException):
    """The run stops on all ranks, because one of them received a signal.

    Like KeyboardInterrupt, it is not an Exception, because it may be raised inside a library that catches every Exception.
    """


class StopSignal:
    """Records SIGTERM, SIGUSR1 or Ctrl-C. A second signal ends the process immediately.

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
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
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
            if time.monotonic() - self._last_signal_time < SIGNAL_DEBOUNCE_SECONDS:
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
                elif time.monotonic() - first_signal_time >= SIGNAL_DEBOUNCE_SECONDS:
                    time.sleep(1)  # give the handler time to end the process with the signal itself
                    os._exit(128 + number[0])


def force_exit(exit_code: int) -> NoReturn:
    """Exit without waiting for other threads. A thread that reads from an unreachable server would take minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
