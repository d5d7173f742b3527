"""The launch environment, GPU detection and signals."""

import os
import signal
import threading
import time
from contextlib import closing, suppress

import pytest

from tandem.trainer import runtime
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until

LAUNCHED = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "WORLD_SIZE")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 4),
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "8"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "7,8(x2)"}, 8),
        ({"WORLD_SIZE": "8"}, 8),
    ],
)
def test_the_ranks_of_a_machine_are_known_whatever_launched_them(monkeypatch, given, expected):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert runtime.max_local_world_size() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], 0),
        (["proc/driver/nvidia/gpus/0000:01:00.0", "proc/driver/nvidia/gpus/0000:02:00.0"], 2),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm"], 2),
        (["dev/nvidia5", "dev/nvidiactl", "proc/driver/nvidia/gpus/a", "proc/driver/nvidia/gpus/b"], 1),
        (["dev/nvidiactl"], 1),
        (["dev/dxg"], 1),
    ],
)
def test_gpus_are_found_by_any_of_their_device_files(monkeypatch, tmp_path, files, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert runtime.num_gpus(tmp_path) == expected
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(runtime, "num_gpus", lambda: expected)
    runtime.silence_library_warnings()
    assert os.environ.pop("DS_ACCELERATOR", None) == (None if expected else "cpu")


@pytest.mark.parametrize(
    ("visible", "expected"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("GPU-8932f937", 1), ("1,-1,2", 1)]
)
def test_hidden_gpus_are_not_counted(monkeypatch, tmp_path, visible, expected):
    for index in range(3):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / f"nvidia{index}").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert runtime.num_gpus(tmp_path) == expected


def test_no_library_takes_a_signal_for_an_error_of_its_own():
    def library() -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with closing(runtime.StopSignal()) as stop_signal:
        stop_signal.mark_rendezvous_done()
        with pytest.raises(runtime.StopRequested), stop_signal.interruptible():
            library()


def test_a_signal_starts_no_thread(monkeypatch):
    """From Python 3.12 on an exiting process raises if it starts a thread, and a signal may arrive then."""
    others, start, started = threading.enumerate(), threading.Thread.start, []
    stop = runtime.StopSignal()
    (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals" and thread not in others)

    def recorded(thread):
        if threading.current_thread() in (listener, threading.main_thread()):
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    monkeypatch.setattr(runtime, "RENDEZVOUS_TIMEOUT_SECONDS", 2 * TEST_TIMEOUT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: stop.has_arrived)
    stop.close()
    listener.join()
    assert started == []
