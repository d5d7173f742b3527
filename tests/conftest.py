"""What every test shares: one thread, checked annotations, a seeded generator, and a process as it was before the others.

The import hook turns the jaxtyping annotations of our packages into checks, here only: in production they
cost nothing. It must be in place before the first import of `trainer` or `kernels`, hence the order below.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests import process_state
from tests.ranks import check_annotations

if not torch.cuda.is_available():
    # Kernels run on the CPU, line by line, in Triton's interpreter. Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

check_annotations()


@pytest.fixture(autouse=True, scope="session")
def use_single_thread() -> None:
    """Sums in the same order on every machine, and cores left to the other ranks."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def freeze_existing_objects() -> None:
    """DeepSpeed's bf16 optimizer collects garbage eight times, and would look at all objects of earlier modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def restore_terminal_signals() -> None:
    """A shell's background job ignores Ctrl-C and SIGQUIT, nohup SIGHUP, and so would every program a test starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def restore_process_after_module() -> Iterator[None]:
    """Also where a fixture of the module has changed it."""
    with process_state.restore_process_state():
        yield


@pytest.fixture(autouse=True)
def restore_process_after_test() -> Iterator[None]:
    with process_state.restore_process_state():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """The randomness of a test."""
    return torch.Generator().manual_seed(20231121)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Its ranks wait for most of a minute. As one of the last files it would keep the other test processes waiting too.
    items.sort(key=lambda item: "/watchdog/" not in item.nodeid)
    for item in items:
        if "tests/kernels/device/" in item.nodeid and torch.cuda.is_available():
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for marker in ("full_size", "chaos"):
            if item.get_closest_marker(marker) and marker not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"runs when asked for: -m {marker}"))
