"""`tandem prepare --executor slurm` on a Slurm of two nodes."""

import argparse
import errno
import os
import signal
from pathlib import Path

import pytest

from tandem.data_prep import prepare
from tandem.data_prep.cluster import submissions
from tandem.data_prep.tokenizers import build
from tandem.trainer.config import UserError
from tests.promises.conftest import run_tandem
from tests.timeouts import wait_until

pytest.importorskip("datatrove", reason="datatrove is not installed")
pytestmark = pytest.mark.slow


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
    tokenizer.write_text(build.train_bpe((path.read_text() for path in inputs), 300, "<|endoftext|>"))
    arguments = ["prepare", "--input", *inputs, "--tokenizer", tokenizer, "--held-out", 0.1,
                 "--sample-tokens", 512, "--shard-tokens", 50_000]  # fmt: skip
    output, logs = tmp_path / "jobs", tmp_path / "jobs.jobs"
    on_slurm = [*arguments, "--output", output, "--executor", "slurm", "--slurm", "partition=cpu", "--tasks"]
    submitted = run_tandem(*on_slurm, 3, **slurm.environment)
    assert submitted.returncode == 0, submitted.stderr
    assert f"failed task: {logs}/1" in submitted.stdout
    wait_until(lambda: task_of(f"{logs}/1/encode"))
    os.kill(task_of(f"{logs}/1/encode"), signal.SIGKILL)
    wait_until(lambda: not slurm.command_output("squeue", "--noheader"))  # no job waits for ever for the killed one

    # Its jobs wait until the refusal is seen: on a busy machine they would end before another command has begun.
    later = [*on_slurm[:-1], "--slurm", "begin=now+1hour", "--tasks"]
    again = run_tandem(*later, 2, **slurm.environment)
    assert "have ended before the corpus was complete" in again.stdout
    refused = run_tandem(*arguments, "--output", output, **slurm.environment)
    assert refused.returncode == 2
    assert "is being prepared by Slurm: encode" in refused.stderr
    for job in slurm.command_output("squeue", "--noheader", "--format=%F").split():
        slurm.command_output("scontrol", "update", f"JobId={job}", "StartTime=now")
    alone = run_tandem(*arguments, "--output", tmp_path / "alone", "--workers", 1)
    assert alone.returncode == 0, alone.stderr
    wait_until(lambda: not slurm.command_output("squeue", "--noheader"))
    assert len(list((tmp_path / "alone").glob("*.tar"))) > 2
    assert files(output) == files(tmp_path / "alone"), "\n".join(path.read_text() for path in logs.rglob("*.out"))
    assert "already prepared" in run_tandem(*on_slurm, 4, **slurm.environment).stdout


def test_a_job_that_cannot_be_put_on_record_is_cancelled(slurm, tmp_path, monkeypatch):
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    replaced = Path.replace

    def replace(path, target):
        if target.name == submissions.SUBMISSION_FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replaced(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    arguments = argparse.ArgumentParser()
    prepare.add_arguments(arguments)
    inputs = [str(path) for path in sorted(Path(os.__file__).parent.glob("*.py"))[:2]]
    output = tmp_path / "out"
    command = ["--input", *inputs, "--output", str(output), "--executor", "slurm",
               "--slurm", "partition=cpu", "--slurm", "begin=now+1hour"]  # fmt: skip
    with pytest.raises(
        UserError, match=r"--executor: slurm could not submit the job train-tokenizer \(.*No space left"
    ):
        prepare.run(arguments.parse_args(command))
    wait_until(lambda: not slurm.command_output("squeue", "--noheader"))
    assert not output.exists()
    assert not output.with_name("out.jobs").exists()
