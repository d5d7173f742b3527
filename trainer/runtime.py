"""The process and its run folder: logging by rank, determinism, signals, what machine and code this was.

Nothing here knows what is being trained. The one idea: a signal only sets a flag, and the loop decides between two steps,
on all ranks alike, what to do about it.
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
"""The run saved on a signal and wants to be started again with the same command."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNAL_DEBOUNCE_SECONDS = 5.0
"""Signals that follow one another this closely count as one."""
RENDEZVOUS_TIMEOUT_SECONDS = 15.0
"""How long after a signal ranks may still take to meet."""
REMOTE_STOP_SIGNAL = signal.SIGURG
"""What a process sends itself when another rank was told to stop; ignored where nobody listens."""
REMOTE_STOP_NAME = "a signal to another rank"

PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class CurrentStderr:
    """Writes to whatever sys.stderr is at that moment, so that a progress bar that has taken it over stays whole."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def start_logging(rank: int) -> None:
    """Rank 0 logs from INFO on, other ranks from WARNING on; all to stderr."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(CurrentStderr())
    faulthandler.enable(2)  # so that a fault of memory or disk, which is no exception, says where it met us
    logging.basicConfig(level=level, format=f"[rank {rank}] %(message)s", handlers=[handler], force=True)
    for noisy in ("megatron", "torch.distributed", "wandb", "DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def silence_library_warnings() -> None:
    """Libraries imported from here on do not warn about extras they can do without, nor about one another's deprecations."""
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\b.*")
    if not num_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
        # A CUDA build of torch warns on a machine that has CUDA's compiler and no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def num_gpus(root: Path = Path("/")) -> int:
    """NVIDIA GPUs of this machine that are not hidden, by their files below `root`, without importing torch.

    A GPU whose file a container forbids to open is counted.
    Some sandboxes have device files and nothing in /proc; Windows' Linux has /dev/dxg alone, for all GPUs, counted as one.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return len(list(takewhile(lambda name: name and not name.startswith("-"), names)))  # CUDA stops at -1 as well
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*"):
        if found := list(root.glob(pattern)):
            return len(found)
    return int(any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg")))


def make_deterministic() -> None:
    """From here on torch refuses operations whose result may differ between two identical runs."""
    import torch

    # cuBLAS reads this when its handle is made: torch documents it as the price of reproducible matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The mode also writes to all fresh memory, to expose reads of it; that costs more than a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_launched() -> bool:
    """Whether torchrun, deepspeed or srun started this process."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def launch_world_size() -> int:
    """Ranks of this launch, from torchrun, deepspeed or srun; 1 when started by hand."""
    return launch_environment()["world_size"]


def launch_rank() -> int:
    """This process's rank in the launch; 0 when started by hand."""
    return launch_environment()["rank"]


def launch_environment() -> dict[str, int]:
    """rank, world_size and local_rank of this process, from torchrun, deepspeed or srun; 0, 1 and 0 when started by hand."""
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
    defaults = {"rank": 0, "world_size": 1, "local_rank": 0}
    return {key: int(os.environ.get(name, defaults[key])) for key, name in names.items()}


def max_local_world_size() -> int:
    """How many ranks of this launch share a machine, at most."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # torchrun, deepspeed, srun
        if given := os.environ.get(name):
            return max(int(nodes.split("(")[0]) for nodes in given.split(","))  # Slurm writes 8(x2),4
    return int(os.environ.get("WORLD_SIZE", 1))


def set_parent_death_signal() -> None:
    """Where a launcher started this rank, its death is a SIGTERM to the rank from here on: no rank trains on without it."""
    if "RANK" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


class StopRequested(BaseException):
    """The run stops here, on this rank and on all others, because one of them was told to.

    As KeyboardInterrupt is no Exception: a signal raises it inside of whatever library then runs, and many take any Exception
    for an error of their own.
    """


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 or Ctrl-C; another one after a few seconds ends the process at once.

    Not at once after the first: a signal to a whole process group arrives twice, directly and passed on by torchrun.
    Where the ranks do not meet soon after a signal the process ends too, with REQUEUE_EXIT_CODE: nothing has been done yet.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.has_arrived = False
        """Whether one has come, also while the main thread is in a collective and has not seen to it."""
        self._last_signal_time: float | None = None
        self._is_interruptible = False
        self._rendezvous_done = threading.Event()
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._previous_handlers[REMOTE_STOP_SIGNAL] = signal.signal(REMOTE_STOP_SIGNAL, self._on_remote_stop)
        # Python runs a handler between two instructions of the main thread, which may hang in a collective for ever; what the
        # interpreter writes here when a signal arrives is read by a thread, so that the second one ends the process even then.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._wakeup_sender = sender
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch_signals, args=(receiver,), name="signals", daemon=True).start()

    def mark_rendezvous_done(self) -> None:
        """All ranks are there: from now on they agree on what to do about a signal."""
        self._rendezvous_done.set()

    def close(self) -> None:
        """Signals do what they did before."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._wakeup_sender.close()  # which ends the thread

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block, in the main thread, a signal that has come or comes raises StopRequested at once."""
        self._is_interruptible = True
        try:
            if self.signal_name is not None:
                raise StopRequested
            yield
        finally:
            self._is_interruptible = False

    def iterate_until_stop(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes, which also interrupts the wait for the next one."""
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
        """Another rank was told to stop, so this one is; the first signal of its own does not end it yet. From any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, REMOTE_STOP_SIGNAL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._last_signal_time is not None and time.monotonic() - self._last_signal_time < SIGNAL_DEBOUNCE_SECONDS:
            return
        if self._last_signal_time is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_name, self._last_signal_time = signal.Signals(number).name, time.monotonic()
        self._raise_if_interruptible()

    def _on_remote_stop(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or REMOTE_STOP_NAME
        self._raise_if_interruptible()

    def _raise_if_interruptible(self) -> None:
        if self._is_interruptible:
            self._is_interruptible = False  # once: another signal must not raise while this is being caught
            raise StopRequested

    def _watch_signals(self, receiver: socket.socket) -> None:
        """Ends the process on a second signal that its main thread has not seen to, and on the first where it meets nobody.

        Starts no thread for that: from Python 3.12 on a process that ends refuses new ones, with a traceback.
        """
        first_signal_time = None
        with receiver:
            while True:
                remaining_seconds = (
                    None
                    if first_signal_time is None or self._rendezvous_done.is_set()
                    else first_signal_time + RENDEZVOUS_TIMEOUT_SECONDS - time.monotonic()
                )
                receiver.settimeout(None if remaining_seconds is None else max(remaining_seconds, 0.01))
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
                    time.sleep(1)  # the handler ends the process by the signal itself, where it runs
                    os._exit(128 + number[0])


def force_exit(exit_code: int) -> NoReturn:
    """The process ends, whatever its threads wait for: one that fetches from a store that does not answer takes minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
