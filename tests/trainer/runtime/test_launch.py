"""The launch environment and the detection of GPUs."""

import os

import pytest

from tandem.trainer.runtime import launch, process

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
    assert launch.max_local_world_size() == expected


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
    assert launch.num_gpus(tmp_path) == expected
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(process, "num_gpus", lambda: expected)
    process.silence_library_warnings()
    assert os.environ.pop("DS_ACCELERATOR", None) == (None if expected else "cpu")


@pytest.mark.parametrize(
    ("visible", "expected"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("GPU-8932f937", 1), ("1,-1,2", 1)]
)
def test_hidden_gpus_are_not_counted(monkeypatch, tmp_path, visible, expected):
    for index in range(3):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / f"nvidia{index}").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.num_gpus(tmp_path) == expected
