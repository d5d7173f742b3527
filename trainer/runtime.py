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
SAME_SIGNAL_SECONDS = 5.0
"""Signals that follow one another this closely count as one."""
MEETING_SECONDS = 15.0
"""How long after a signal ranks may still take to meet."""
ELSEWHERE_SIGNAL = signal.SIGURG
"""What a process sends itself when another rank was told to stop; ignored where nobody listens."""
ELSEWHERE = "a signal to another rank"

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


def quiet_libraries() -> None:
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


def node_ranks() -> int:
    """How many ranks of this launch share a machine, at most."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # torchrun, deepspeed, srun
        if given := os.environ.get(name):
            return max(int(nodes.split("(")[0]) for nodes in given.split(","))  # Slurm writes 8(x2),4
    return int(os.environ.get("WORLD_SIZE", 1))


def stop_with_launcher() -> None:
    """Where a launcher started this rank, its death is a SIGTERM to the rank from here on: no rank trains on without it."""
    if "RANK" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)


class Stopped(BaseException):
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
        self.name: str | None = None
        self.came = False
        """Whether one has come, also while the main thread is in a collective and has not seen to it."""
        self._seen: float | None = None
        self._interrupts = False
        self._met = threading.Event()
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        self._before[ELSEWHERE_SIGNAL] = signal.signal(ELSEWHERE_SIGNAL, self._remember_elsewhere)
        # Python runs a handler between two instructions of the main thread, which may hang in a collective for ever; what the
        # interpreter writes here when a signal arrives is read by a thread, so that the second one ends the process even then.
        arrived, arrives = socket.socketpair()
        arrives.setblocking(False)
        self._arrives = arrives
        signal.set_wakeup_fd(arrives.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_in_time, args=(arrived,), name="signals", daemon=True).start()

    def met(self) -> None:
        """All ranks are there: from now on they agree on what to do about a signal."""
        self._met.set()

    def close(self) -> None:
        """Signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._arrives.close()  # which ends the thread

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block, in the main thread, a signal that has come or comes raises Stopped at once."""
        self._interrupts = True
        try:
            if self.name is not None:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes, which also interrupts the wait for the next one."""
        left = iter(items)
        with suppress(Stopped):
            while True:
                with self.interrupting():
                    try:
                        item = next(left)
                    except StopIteration:
                        return
                yield item

    def told_elsewhere(self) -> None:
        """Another rank was told to stop, so this one is; the first signal of its own does not end it yet. From any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, ELSEWHERE_SIGNAL)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._seen is not None and time.monotonic() - self._seen < SAME_SIGNAL_SECONDS:
            return
        if self._seen is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name, self._seen = signal.Signals(number).name, time.monotonic()
        self._interrupt()

    def _remember_elsewhere(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or ELSEWHERE
        self._interrupt()

    def _interrupt(self) -> None:
        if self._interrupts:
            self._interrupts = False  # once: another signal must not raise while this is being caught
            raise Stopped

    def _end_in_time(self, arrived: socket.socket) -> None:
        """Ends the process on a second signal that its main thread has not seen to, and on the first where it meets nobody.

        Starts no thread for that: from Python 3.12 on a process that ends refuses new ones, with a traceback.
        """
        came = None
        with arrived:
            while True:
                left = None if came is None or self._met.is_set() else came + MEETING_SECONDS - time.monotonic()
                arrived.settimeout(None if left is None else max(left, 0.01))
                try:
                    number = arrived.recv(1)
                except TimeoutError:
                    if not self._met.is_set():
                        leave(REQUEUE_EXIT_CODE)
                    continue
                if not number:
                    return
                if number[0] not in STOP_SIGNALS:
                    continue
                if came is None:
                    came, self.came = time.monotonic(), True
                elif time.monotonic() - came >= SAME_SIGNAL_SECONDS:
                    time.sleep(1)  # the handler ends the process by the signal itself, where it runs
                    os._exit(128 + number[0])


def leave(code: int) -> NoReturn:
    """The process ends, whatever its threads wait for: one that fetches from a store that does not answer takes minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
