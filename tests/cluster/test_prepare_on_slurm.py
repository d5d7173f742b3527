"""`tandem prepare --executor slurm` on a Slurm of two nodes that is started for it here, where Slurm is installed."""

import argparse
import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import prepare
from data_prep.cluster import jobs
from data_prep.tokenizers import build
from tests.promises.conftest import tandem
from trainer.config import UserError

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch", "squeue") if shutil.which(name, path=SBIN) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as their user: only root can run one"),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0
ReturnToService=2
MpiDefault=none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=8000
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds it."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not tmp_path: the name of a socket is short
    folder.chmod(0o755)  # munged insists
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=free_ports())
    (folder / "slurm.conf").write_text(conf)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    munged = [
        "munged",
        "--foreground",
        "--force",
        *(f"--{option}={folder}/munge.{end}" for option, end in files.items()),
    ]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = []
    try:
        with (folder / "daemons.log").open("w") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
                if command is munged:
                    eventually((folder / "munge.socket").exists)
        eventually(lambda: asked(environment, "sinfo", "--noheader", "--states=idle", "--format=%D") == "2")
        yield environment
        asked(environment, "scancel", "--user=root")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports() -> list[int]:
    """One, and two that follow one another; free a moment ago."""
    for first in range(26_000 + os.getpid() % 3000, 32_000):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
            return [first, first + 1, first + 2]
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def asked(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout.strip()


def eventually(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def task_of(word: str) -> int | None:
    """A process that datatrove works in, by what is in its command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().split("\0")
        except OSError:
            continue
        if "python" in command[0] and any(word in argument for argument in command):
            return int(path.parent.name)
    return None


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_task_and_another_number_of_tasks_give_the_bytes_of_one_machine(slurm, tmp_path):
    inputs = sorted(Path(os.__file__).parent.glob("*.py"))[:25]
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(build.train((path.read_text() for path in inputs), 300, "<|endoftext|>"))
    arguments = ["prepare", "--input", *inputs, "--tokenizer", tokenizer, "--held-out", 0.1,
                 "--sample-tokens", 512, "--shard-tokens", 50_000]  # fmt: skip
    output, logs = tmp_path / "jobs", tmp_path / "jobs.jobs"
    on_slurm = [*arguments, "--output", output, "--executor", "slurm", "--slurm", "partition=cpu", "--tasks"]
    submitted = tandem(*on_slurm, 3, **slurm)
    assert submitted.returncode == 0, submitted.stderr
    assert f"failed: {logs}/1" in submitted.stdout
    eventually(lambda: task_of(f"{logs}/1/encode"))
    os.kill(task_of(f"{logs}/1/encode"), signal.SIGKILL)
    eventually(lambda: not asked(slurm, "squeue", "--noheader"))  # no job waits for ever for the killed one

    again = tandem(*on_slurm, 2, **slurm)
    assert "have ended and are not done" in again.stdout
    refused = tandem(*arguments, "--output", output, **slurm)
    assert refused.returncode == 2
    assert "is being prepared by Slurm: encode" in refused.stderr
    alone = tandem(*arguments, "--output", tmp_path / "alone", "--workers", 1)
    assert alone.returncode == 0, alone.stderr
    eventually(lambda: not asked(slurm, "squeue", "--noheader"))
    assert len(list((tmp_path / "alone").glob("*.tar"))) > 2
    assert files(output) == files(tmp_path / "alone"), "\n".join(path.read_text() for path in logs.rglob("*.out"))
    assert "already prepared" in tandem(*on_slurm, 4, **slurm).stdout


def test_a_job_that_cannot_be_put_on_record_is_cancelled(slurm, tmp_path, monkeypatch):
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    replaced = Path.replace

    def replace(path, target):
        if target.name == jobs.NOTE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replaced(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    arguments = argparse.ArgumentParser()
    prepare.add_arguments(arguments)
    inputs = [str(path) for path in sorted(Path(os.__file__).parent.glob("*.py"))[:2]]
    output = tmp_path / "out"
    command = ["--input", *inputs, "--output", str(output), "--executor", "slurm",
               "--slurm", "partition=cpu", "--slurm", "begin=now+1hour"]  # fmt: skip
    with pytest.raises(UserError, match=r"--executor: slurm; no job for train \(.*No space left"):
        prepare.run(arguments.parse_args(command))
    eventually(lambda: not asked(slurm, "squeue", "--noheader"))
    assert not output.exists()
    assert not output.with_name("out.jobs").exists()
