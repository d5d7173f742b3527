"""Who starts the ranks changes nothing: torchrun, deepspeed and srun's environment give the same bits."""

import os
import shutil
import signal
import socket
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from subprocess import Popen, run

import psutil
import pytest
import yaml

from tandem.trainer.metrics.history import read_history
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests.hostile_modules import write_hostile_modules
from tests.ports import free_ports
from tests.promises.conftest import (
    clean_environment,
    fork_tandem,
    has_signal_handler,
    read_step_records,
    start_command,
    two_phase_config,
    wait_for_exit,
)
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 4


def launched(command: list[object], config: Path, name: str, **environment: str) -> AbstractContextManager[Popen[str]]:
    """The command begun in the folder of the config, as one launcher of the run of that name; gone when the block ends."""
    return start_command([*command, config.name, f"run.name={name}"], config.parent, **environment)


def slurm(rank: int, port: str) -> dict[str, str]:
    """What srun and launch/slurm/run.sh give task `rank` of 2."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


DEEPSPEED = """#!/bin/sh
{python} -c 'import os, signal, sys, time
os.mkdir("started")
time.sleep(1.5)  # imports
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
time.sleep(60)' &
wait $!
"""
"""A launcher that does not pass signals on, with one rank. It returns the exit code of the rank."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=lambda number: number.name)
def test_a_signal_to_deepspeed_reaches_ranks_that_are_still_starting(number, tmp_path, corpus):
    shutil.copytree(LAUNCH, tmp_path / "launch")  # a repository without .venv, whose program would be first on the path
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(two_phase_config("btlm", corpus, Path("runs"))))
    program = tmp_path / "bin" / "deepspeed"
    program.parent.mkdir()
    program.write_text(DEEPSPEED.format(python=sys.executable))
    program.chmod(0o755)
    environment = clean_environment() | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [tmp_path / "launch" / "deepspeed.sh", "1", "config.yaml"]
    with Popen(command, env=environment, cwd=tmp_path) as process:
        wait_until(lambda: (tmp_path / "started").exists() or process.poll() is not None)
        process.send_signal(number)
        assert process.wait(TEST_TIMEOUT_SECONDS) == REQUEUE_EXIT_CODE


def test_torchrun_deepspeed_and_srun_train_the_same_bits(tmp_path, corpus):
    """From a folder of the user, whose files have the names of modules: paths are relative to it, and no module is from it."""
    folder = tmp_path / "my work"
    write_hostile_modules(folder)
    (folder / "local").symlink_to(LAUNCH / "local.sh")
    environment = {"PYTHONPATH": f":{os.environ.get('PYTHONPATH', '')}:.", "CDPATH": "/:/tmp"}
    config = folder / "my config.yaml"
    parallel = {"tp_size": 2, "zero_stage": 1, "recompute": "none"}
    tree = two_phase_config("stablelm", corpus, Path("runs"), steps=STEPS // 2, parallel=parallel)
    config.write_text(yaml.safe_dump(tree))
    port, other = map(str, free_ports(2))
    another_run = socket.socket()
    with suppress(OSError):  # there is one
        another_run.bind(("", 29500))
        another_run.listen()
    with (
        another_run,
        launched(["sh", "./local", 2], config, "torchrun", **environment) as torchrun,
        launched([LAUNCH / "deepspeed.sh", 2], config, "deepspeed", MASTER_PORT=other, **environment) as deepspeed,
    ):
        log = tmp_path / "srun.log"
        command = ["train", config, "run.name=srun", f"run.root={folder / 'runs'}"]
        tasks = [fork_tandem(command, log=log, environment=slurm(rank, port)) for rank in (0, 1)]
        codes = [wait_for_exit(task) for task in tasks]
        for process in (torchrun, deepspeed):
            said, _ = process.communicate(timeout=TEST_TIMEOUT_SECONDS)
            assert process.returncode == 0, said
        assert codes == [0, 0], log.read_text()
    runs = {name: read_step_records(folder / "runs" / name) for name in ("torchrun", "deepspeed", "srun")}
    one = runs["torchrun"]
    for name, other in runs.items():
        assert sorted(other) == list(range(1, STEPS + 1))
        for step, record in other.items():
            assert (record["loss"], record["grad_norm"]) == (one[step]["loss"], one[step]["grad_norm"]), name


def test_a_rank_whose_launcher_dies_while_it_begins_does_not_train_on(tmp_path, corpus):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(two_phase_config("btlm", corpus, tmp_path / "runs")))
    rank = [sys.executable, "-m", "tandem.trainer", "train", str(config)]
    script = f"import subprocess, time; print(subprocess.Popen({rank}).pid, flush=True); time.sleep(1000)"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    with start_command([sys.executable, "-c", script], **alone) as launcher:
        pid = int(launcher.stdout.readline())
        process = psutil.Process(pid)
        wait_until(lambda: has_signal_handler(pid, signal.SIGTERM))  # it imports for seconds yet
        launcher.kill()
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not list(tmp_path.rglob("COMMITTED"))


def test_a_single_rank_too_is_started_again(tmp_path, corpus):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(two_phase_config("btlm", corpus, tmp_path / "runs", checkpoint={"every_steps": 1}))
    )
    folder = tmp_path / "runs" / "tiny"
    terminal_of_slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # one that `srun --pty bash` opens
    with launched([LAUNCH / "local.sh", 1], config, "tiny", **terminal_of_slurm) as launcher:
        wait_until(lambda: (folder / "metrics.jsonl").is_file() and read_step_records(folder))
        [rank] = psutil.Process(launcher.pid).children()
        rank.kill()
        said, _ = launcher.communicate(timeout=TEST_TIMEOUT_SECONDS)
    assert launcher.returncode == 0, said
    assert len(read_history(folder).starts) == 2
    assert read_history(folder).end_record["reason"] == "finished"


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        (["local.sh", 8], {}),
        (["deepspeed.sh", 8], {}),
        (["multi_node.sh"], {"HEAD": "127.0.0.1:29500", "NODES": "1", "NODE": "0"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_a_script_in_one_line_before_it_starts_ranks(script, environment, tmp_path):
    """A launcher would add lines of its own."""
    name, *ranks = script
    rows = [f"schedule.phases.{index}.micro_batch_size=1" for index in (0, 1)]
    command = [LAUNCH / name, *ranks, "demo-btlm", f"data.sources.corpus={tmp_path}/none", *rows]
    done = run(list(map(str, command)), env=clean_environment() | environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tandem: {tmp_path}/none/manifest.json: no such file")
    assert done.stderr.count("\n") == 1
