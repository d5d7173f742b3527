"""Set up this process: logging by rank, warnings of libraries, determinism, the end of its launcher, and its own exit."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import warnings
from traceback import format_exception
from typing import NoReturn

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.runtime import launch

PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""


class CurrentStderr:
    """Looks up sys.stderr at each write, because a progress bar may have replaced it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class SafeFormatter(logging.Formatter):
    """Escapes control characters. Arguments, which may be names and errors of others, stay on the line of the message."""

    def format(self, record: logging.LogRecord) -> str:
        record = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            text_types = str, os.PathLike, BaseException
            record.args = tuple(
                escape_control_characters(str(value), one_line=True) if isinstance(value, text_types) else value
                for value in record.args
            )
        return escape_control_characters(super().format(record))


def escape_messages() -> None:
    """Escape control characters in messages that are logged before `start_logging`, and in the traceback of a crash."""
    assert logging.lastResort
    logging.lastResort.setFormatter(SafeFormatter())
    sys.excepthook = lambda *error: sys.stderr.write(escape_control_characters("".join(format_exception(*error))))
    threading.excepthook = lambda found: sys.excepthook(
        found.exc_type, found.exc_value or found.exc_type(), found.exc_traceback
    )


def check_working_folder() -> None:
    """Raises: UserError if the working folder was deleted. Libraries would fail to load without a clear message."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working folder has been deleted; change into a folder that exists") from None


def start_logging(rank: int) -> None:
    """Log to stderr, from INFO up on rank 0 and from WARNING up on other ranks."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(CurrentStderr())
    faulthandler.enable(2)  # print a traceback on a segmentation fault or bus error
    handler.setFormatter(SafeFormatter(f"[rank {rank}] %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("megatron", "torch.distributed", "wandb", "DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def silence_library_warnings() -> None:
    """Suppress warnings about optional packages and deprecations from libraries that are imported after this call."""
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\b.*")
    if not launch.count_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), launch.find_gpus()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it falls back to the CPU
        # A CUDA build of torch warns on a machine with a CUDA compiler but no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def make_deterministic() -> None:
    """Make torch raise for operations whose result may differ between two identical runs."""
    import torch

    # cuBLAS reads this when its handle is created. torch requires it for deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The mode also fills new memory, to expose reads of uninitialized values. For a small model that costs more than a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_parent_death_signal() -> None:
    """Send this rank SIGUSR1 if the launcher that started it dies, so that no rank outlives its launcher.

    The tasks of srun need none: Slurm ends them.
    """
    if launch.current_launch().launcher not in (None, "srun"):
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGUSR1)


def force_exit(exit_code: int) -> NoReturn:
    """Exit without waiting for other threads. A thread that reads from an unreachable server would take minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
