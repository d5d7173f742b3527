"""What a process knows of its launch."""

import pytest

from trainer import runtime

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
