"""What one test changes of the process, the next one does not see."""

import logging
import os
import signal
import sys
from typing import Any

import torch

from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.runtime import process, signals
from tests.process_state import IGNORED_VARIABLES, parent_death_signal, restore_process_state, wakeup_fd


def facts() -> dict[str, Any]:
    return {
        "variables": {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES},
        "signals": [signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signals.REMOTE_STOP_SIGNAL)],
        "wakeup": wakeup_fd(),
        "death of the parent": parent_death_signal(),
        "level": logging.getLogger().level,
        "levels": {name: logging.getLogger(name).level for name in ("torch.distributed", "wandb")},
        "handlers": list(logging.getLogger().handlers),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "new memory": torch.utils.deterministic.fill_uninitialized_memory,
        "draws": torch.get_rng_state().tolist(),
        "hook": sys.excepthook,
        "path": list(sys.path),
    }


def test_what_a_command_changes_of_the_process_is_put_back(monkeypatch):
    before = facts()
    with restore_process_state():
        with monkeypatch.context() as launched:
            for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
                launched.setenv(name, value)
            process.set_parent_death_signal()
        signals.StopSignal()
        with mesh_context(1):
            process.start_logging(0)
            process.make_deterministic()
            torch.rand(1)
            sys.path.append("/nowhere")
        changed = facts()
    assert [name for name in before if before[name] == changed[name]] == []
    assert facts() == before
