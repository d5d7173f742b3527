"""Who starts the ranks changes nothing: torchrun, deepspeed and srun's environment give the same bits."""

import socket
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import pytest
import yaml

from tests.promises.conftest import begun, steps_of, two_phases

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 4


def launched(command: list[object], config: Path, name: str, **environment: str) -> AbstractContextManager[Popen[str]]:
    """The command begun, as one launcher or one rank of the run of that name; gone when the block ends."""
    return begun([*command, config, f"run.name={name}"], **environment)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def slurm(rank: int, port: str) -> dict[str, str]:
    """What srun and launch/slurm/run.sh give task `rank` of 2."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def test_torchrun_deepspeed_and_srun_train_the_same_bits(tmp_path, corpus):
    config = tmp_path / "config.yaml"
    parallel = {"tp_size": 2, "zero_stage": 1, "recompute": "none"}
    tree = two_phases("stablelm", corpus, tmp_path / "runs", steps=STEPS // 2, parallel=parallel)
    config.write_text(yaml.safe_dump(tree))
    port, by_hand = free_port(), [sys.executable, "-m", "trainer", "train"]
    with (
        launched([LAUNCH / "local.sh", 2], config, "torchrun") as torchrun,
        launched([LAUNCH / "deepspeed.sh", 2], config, "deepspeed") as deepspeed,
        launched(by_hand, config, "srun", **slurm(0, port)) as rank_0,
        launched(by_hand, config, "srun", **slurm(1, port)) as rank_1,
    ):
        for process in (torchrun, deepspeed, rank_0, rank_1):
            said, _ = process.communicate(timeout=100)
            assert process.returncode == 0, said
    runs = {name: steps_of(tmp_path / "runs" / name) for name in ("torchrun", "deepspeed", "srun")}
    one = runs["torchrun"]
    for name, other in runs.items():
        assert sorted(other) == list(range(1, STEPS + 1))
        for step, record in other.items():
            assert (record["loss"], record["gradient_norm"]) == (one[step]["loss"], one[step]["gradient_norm"]), name
