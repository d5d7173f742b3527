"""A run on a Slurm of two nodes that is warned, preempted and loses a node, and ends as the run that nothing ended."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.read import open_checkpoint
from tests.cluster.conftest import SlurmCluster
from tests.promises import conftest
from tests.promises.conftest import clean_environment, read_step_records, two_phase_config
from tests.promises.test_resume import differing_tensors
from tests.timeouts import TEST_TIMEOUT_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
corpus = conftest.corpus
STEPS = 180
"""Of each phase: some seconds, to be interrupted in."""
OPTIONS = (
    "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable",
)  # fmt: skip
"""What this Slurm has in place of a cluster's machines."""

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """For two data-parallel ranks, a node each."""
    folder = tmp_path_factory.mktemp("slurm")
    tree = two_phase_config(
        "btlm",
        corpus,
        folder / "runs",
        steps=STEPS,
        log={"wandb": "offline"},
        checkpoint={"every_steps": STEPS, "keep_last": 2},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


class Job:
    """A job of the shipped script that trains the config."""

    def __init__(
        self, slurm: SlurmCluster, config: Path, name: str, *options: str, overrides: tuple[str, ...] = ()
    ) -> None:
        self.slurm = slurm
        self.folder = config.parent / "runs" / name
        self.log = config.parent / f"{name}.log"
        environment = clean_environment() | slurm.environment | {"CUDA_VISIBLE_DEVICES": ""}
        script = ["launch/slurm/train.sbatch", config, f"run.name={name}", *overrides]
        command = ["sbatch", *OPTIONS, f"--output={self.log}", *options, *script]
        submitted = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert submitted.returncode == 0, submitted.stderr
        self.number = submitted.stdout.strip()

    def says(self, field: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{field}=(\S*)", self.slurm.command_output("scontrol", "show", "job", self.number))
        assert found is not None, field
        return found[1]

    def signal(self, *arguments: str) -> None:
        self.slurm.command_output("scancel", *arguments, self.number)

    def step(self) -> int:
        return max(read_step_records(self.folder), default=0) if (self.folder / "metrics.jsonl").is_file() else 0

    def starts(self) -> list[int]:
        """The step at which each start of the run went on."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if line["kind"] == "start"]

    def until(self, what: Callable[[], object], seconds: float = TEST_TIMEOUT_SECONDS) -> None:
        try:
            wait_until(what, seconds)
        except AssertionError:
            daemons = self.slurm.log.read_text()[-4000:]
            raise AssertionError(f"{self.log.read_text()}\n{self.slurm.command_output('squeue')}\n{daemons}") from None

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step)


def processes_on(slurm: SlurmCluster, node: str) -> dict[int, bytes]:
    """What runs on the node for jobs, with its command: ranks and what they started, and Slurm's process above each task."""
    ours = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={slurm.environment['SLURM_CONF']}".encode()}
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if ours <= set((process / "environ").read_bytes().split(b"\0")):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                for number in {int(process.name), parent} - {1}:
                    found[number] = Path(f"/proc/{number}/cmdline").read_bytes()
    return found


def ranks_on(slurm: SlurmCluster, node: str) -> list[int]:
    found = processes_on(slurm, node)
    return [number for number, command in found.items() if b"\0tandem.trainer\0train\0" in command]


def kill_node(slurm: SlurmCluster, node: str) -> None:
    """As by a power cut, and Slurm has noticed: no process of the node is left."""
    slurm.daemons[node].kill()
    slurm.daemons[node].wait()
    for process in processes_on(slurm, node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    slurm.command_output("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")


def test_warned_preempted_and_with_a_node_lost_a_run_ends_as_if_nothing_had_happened(
    slurm: SlurmCluster, config: Path
) -> None:
    """The run that nothing ends is the job that preempts the other."""
    ours = Job(slurm, config, "ours")
    ours.until_step(10)
    ours.signal("--signal=USR1")
    ours.until(lambda: len(ours.starts()) == 2)

    urgent = Job(slurm, config, "urgent", "--partition=urgent")
    urgent.until_step(1)
    assert ours.says("JobState") == "PENDING"
    preempted_at = ours.step()
    ours.until_step(STEPS + 10)
    assert urgent.says("JobState") == "COMPLETED"

    kill_node(slurm, "n2")
    ours.until(lambda: ours.says("JobState") == "PENDING")
    slurm.start_node("n2")
    ours.until(lambda: ours.says("JobState") in ("COMPLETED", "FAILED"))
    assert (ours.says("JobState"), ours.says("Restarts")) == ("COMPLETED", "3"), ours.log.read_text()

    warned_at, *later = ours.starts()[1:]
    assert 10 <= warned_at < preempted_at < STEPS
    assert later == [preempted_at, STEPS], "after a signal where it was, after a kill at the last checkpoint"
    same_run(ours.folder, urgent.folder)


def same_run(folder: Path, straight: Path) -> None:
    """Every step, its loss, the data, the final state; one curve in wandb, however often it was started."""
    one, other = read_step_records(straight), read_step_records(folder)
    assert sorted(other) == sorted(one) == list(range(1, 2 * STEPS + 1))
    assert [other[step]["loss"] for step in sorted(other)] == [one[step]["loss"] for step in sorted(one)]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["reason"] == "finished"
    assert main(["audit", str(folder)]) == 0
    assert differing_tensors(open_checkpoint(straight), open_checkpoint(folder)) == []
    offline = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
    assert offline == 4 * [(folder / "wandb" / "run_id").read_text().strip()]


@pytest.mark.chaos
def test_a_killed_rank_is_a_new_start_and_scancel_a_save_and_the_end(slurm: SlurmCluster, config: Path) -> None:
    """And a warning that comes while the ranks are starting is a new start too, whether they listen yet or die of it."""
    job = Job(slurm, config, "killed")
    job.until(lambda: ranks_on(slurm, "n2"))
    job.signal("--signal=USR1", "--batch")
    job.until(lambda: job.says("Restarts") == "1")
    step = job.step()
    job.until_step(step + 10)

    for rank in ranks_on(slurm, "n2"):
        os.kill(rank, signal.SIGKILL)
    job.until(lambda: job.says("Restarts") == "2")
    assert "the run failed (exit code 137); requeueing the job" in job.log.read_text()

    job.until_step(job.step() + 10)
    job.signal()
    job.until(lambda: job.says("JobState") == "CANCELLED")
    assert open_checkpoint(job.folder).step == job.step()
    assert not slurm.command_output("squeue", "--noheader")


def test_what_no_new_start_can_mend_ends_the_job(slurm: SlurmCluster, config: Path, tmp_path: Path) -> None:
    """A mistake, also one that rank 0 alone meets; a python that does not know our libraries: one line, and exit code 2."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "omegaconf.py").write_text("raise ImportError('no omegaconf')")
    paths = [f"--export=ALL,PYTHONPATH={path}" for path in (tmp_path / "light", tmp_path)]
    wait, python = "--export=ALL,SLURM_WAIT=3", Path(sys.executable).with_name("python")
    jobs = {
        "tandem: optim.beta1: 2": Job(slurm, config, "mistake", overrides=("optim.beta1=2",)),
        "tandem: run.root: /dev/null/runs": Job(slurm, config, "alone", wait, overrides=("run.root=/dev/null/runs",)),
        f"cannot import tandem.trainer.__main__ with {python} (ImportError: no omegaconf)": Job(
            slurm, config, "light", paths[0]
        ),
        f"cannot import tandem.trainer.train with {python} (ImportError: no torch)": Job(
            slurm, config, "heavy", paths[1]
        ),
    }
    for says, job in jobs.items():
        job.until(lambda job=job: job.says("JobState") == "FAILED")
        assert (job.says("ExitCode"), job.says("Restarts")) == ("2:0", "0")
        assert says in job.log.read_text()
