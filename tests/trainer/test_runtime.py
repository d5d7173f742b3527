"""What a process knows of its launch, and what it finds in its run folder."""

import os
import signal
import threading
import time
from contextlib import closing, suppress

import pytest

from tandem.trainer import runtime
from tandem.trainer.disk import whole_file, write_whole
from tests.waiting import PATIENCE_SECONDS, eventually

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
    assert runtime.node_ranks() == expected


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
    runtime.quiet_libraries()
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


def test_what_a_kill_left_half_written_goes_and_nothing_else(tmp_path):
    write_whole(tmp_path / "report.html", "whole")
    (tmp_path / "manifests").mkdir()
    torn = [tmp_path / "config.yaml.0123abcd.tmp", tmp_path / "manifests" / "a.json.89efffff.tmp"]
    kept = [tmp_path / "notes.tmp", tmp_path / "manifests" / "a.json"]
    for path in (*torn, *kept):
        path.write_text("words")
    runtime.open_run_folder(tmp_path, "run: {}\n")
    assert not any(path.exists() for path in torn)
    assert [path.read_text() for path in kept] == ["words"] * 2
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"


def test_a_file_that_cannot_be_finished_is_what_it_was(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.write("after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_no_library_takes_a_signal_for_an_error_of_its_own():
    def library() -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with closing(runtime.StopSignal()) as stop_signal:
        stop_signal.met()
        with pytest.raises(runtime.Stopped), stop_signal.interrupting():
            library()


def test_without_git_the_commit_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TANDEM_COMMIT", "0123abc")
    assert runtime.environment()["commit"] == "0123abc"


def test_a_signal_starts_no_thread(monkeypatch):
    """From Python 3.12 on a process that ends refuses new threads, with a traceback, and a signal may come then."""
    others, start, started = threading.enumerate(), threading.Thread.start, []
    stop = runtime.StopSignal()
    (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals" and thread not in others)

    def recorded(thread):
        if threading.current_thread() in (listener, threading.main_thread()):
            started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    monkeypatch.setattr(runtime, "MEETING_SECONDS", 2 * PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    eventually(lambda: stop.came)
    stop.close()
    listener.join()
    assert started == []
