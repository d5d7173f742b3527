"""What a test changes of the process that the tests share, put back.

Commands run in this process as they do in one of their own, which ends afterwards: they set variables for libraries,
log to stderr, answer signals and make torch deterministic. The next test must not see that, whichever it is.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch

RESTORED_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGURG,
    signal.SIGCHLD, signal.SIGTTOU,
)  # fmt: skip
"""Those that a run or a test answers."""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
"""Source: linux/prctl.h."""
IGNORED_VARIABLES = {"PYTEST_CURRENT_TEST", "TOKENIZERS_PARALLELISM"}
"""Variables: pytest's own, which names the phase of a test; and what a tokenizer that the process keeps reads at each call."""


@contextmanager
def restore_process_state() -> Iterator[None]:
    """Afterwards the process is what it was before the block, but for what it has imported, allocated and compiled."""
    folder, hook, path, temporary = os.getcwd(), sys.excepthook, list(sys.path), tempfile.tempdir
    variables = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}
    signals = {number: signal.getsignal(number) for number in RESTORED_SIGNALS}
    wakeup, saved_death_signal = wakeup_fd(), parent_death_signal()
    root, levels = logging.getLogger(), {each: each.level for each in all_loggers()}
    handlers = list(root.handlers)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_uninitialized = torch.utils.deterministic.fill_uninitialized_memory
    dtype, threads, rng_state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill_uninitialized
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_rng_state(rng_state)
        root.handlers[:] = handlers
        for each, level in levels.items():
            if each.level != level:
                each.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        if parent_death_signal() != saved_death_signal:
            LIBC.prctl(PR_SET_PDEATHSIG, saved_death_signal)
        sys.excepthook = hook  # torch.distributed puts its own around it at every start
        sys.path[:] = path  # transformers adds the folder of the code that exports bring
        os.chdir(folder)
        tempfile.tempdir = temporary
        for name in os.environ.keys() - variables.keys() - IGNORED_VARIABLES:
            del os.environ[name]
        os.environ.update(variables)


def all_loggers() -> list[logging.Logger]:
    made = logging.root.manager.loggerDict.values()
    return [logging.getLogger(), *(each for each in made if isinstance(each, logging.Logger))]


def wakeup_fd() -> int:
    number = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(number)
    return number


def parent_death_signal() -> int:
    """What the death of its parent is to this process; 0: nothing."""
    number = ctypes.c_int()
    LIBC.prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value
