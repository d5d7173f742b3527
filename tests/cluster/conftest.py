"""A Slurm of two nodes on this machine, started for the tests of a file and gone after them, where Slurm is installed.

Both nodes are daemons here with the machine's own processors. A job that was put back into the queue waits some seconds
rather than two minutes: `cred_expire`, of which 5 is the least. Jobs are put back only if they ask for it (`JobRequeue=0`), and
one in the partition `urgent` puts those in `cpu` back.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.timeouts import wait_until

SEARCH_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
MISSING_PROGRAMS = [name for name in SLURM_PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
NODES = ("n1", "n2")

SLURM_CONF_TEMPLATE = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=8000
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass
class SlurmCluster:
    folder: Path
    log: Path
    environment: dict[str, str]
    """In which its commands find it."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_daemon(self, name: str, *command: str) -> None:
        with self.log.open("a") as log:
            environment = os.environ | self.environment
            self.daemons[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def start_node(self, name: str) -> None:
        self.start_daemon(name, "slurmd", "-D", "-N", name)

    def command_output(self, *command: str) -> str:
        """What one of its commands says."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

    def num_idle_nodes(self) -> int:
        return int(self.command_output("sinfo", "--noheader", "--states=idle", "--partition=cpu", "--format=%D") or 0)


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Of one file, not of the session: its daemons would run beside every test that follows."""
    if MISSING_PROGRAMS:
        pytest.skip(f"Slurm is not installed: no {', '.join(MISSING_PROGRAMS)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as their user: only root can run one")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not tmp_path: the name of a socket is short
    folder.chmod(0o755)  # munged insists
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf = SLURM_CONF_TEMPLATE.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        ports=free_ports(3),
        first_job=1 + os.getpid() * 20 % 5000,
    )
    (folder / "slurm.conf").write_text(conf)
    started = SlurmCluster(
        folder, folder / "daemons.log", {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH_PATH}
    )
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    try:
        options = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        started.start_daemon("munged", "munged", "--foreground", "--force", *options)
        wait_until((folder / "munge.socket").exists)
        started.start_daemon("slurmctld", "slurmctld", "-D")
        for name in NODES:
            started.start_node(name)
        wait_until(lambda: started.num_idle_nodes() == len(NODES))
        yield started
        started.command_output("scancel", "--user=root")
        wait_until(lambda: not started.command_output("squeue", "--noheader"))
    finally:
        for daemon in reversed(started.daemons.values()):
            daemon.terminate()
            daemon.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
