"""The jobs that a folder was given over to: which they are, whether they still wait or run, what they failed of.

The lock on a folder is of one process on one machine, and jobs outlive the command that submitted them; so while they are
there a note in the folder of unfinished work says so. Logs lie beside the folder, not in it: a finished corpus holds
nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.data_prep import output_folder
from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_write

SUBMISSION_FILE = "jobs.json"
RESERVED_SBATCH_OPTIONS = ("array", "dependency", "export", "output", "error", "wrap")
"""Options of sbatch that are not the user's."""
FAILED_SUFFIX = ".failed"
"""Suffix of a file beside the logs that holds the line a task ended with."""


@dataclass(frozen=True)
class Submission:
    """Ids of the jobs that were submitted together, by stage, in their order; and the folder of their logs."""

    logs: str
    jobs: dict[str, str]

    def save(self, output: Path) -> None:
        """The folder belongs to these jobs."""
        atomic_write(_submission_path(output), json.dumps(asdict(self)))

    def failure_lines(self) -> list[str]:
        """`stage-rank: line` of every task that ended with one."""
        paths = sorted(Path(self.logs).glob(f"*{FAILED_SUFFIX}"))
        return [f"{path.stem}: {path.read_text(encoding='utf-8').strip()}" for path in paths]


def load_submission(output: Path) -> Submission | None:
    """The last submission for this folder, as long as it is unfinished."""
    path = _submission_path(output)
    return Submission(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def check_no_running_jobs(output: Path) -> None:
    """Returns where no job works, or will work, in this folder.

    Raises: UserError that says which do, and what they are doing.
    """
    submission = load_submission(output)
    states = _job_states(output, submission) if submission else {}
    if submission and states:
        job_descriptions = ", ".join(
            f"{stage} ({job}) {states[job]}" for stage, job in submission.jobs.items() if job in states
        )
        raise UserError(
            f"--output: {output} is being prepared by Slurm: {job_descriptions}; run the same command when they have ended, or "
            f"scancel them; logs: {submission.logs}"
        )


def create_logs_folder(output: Path) -> Path:
    """A new folder for the logs of one submission, beside the output."""
    root = output.with_name(f"{output.name}.jobs")
    root.mkdir(exist_ok=True)
    number = 1 + max((int(path.name) for path in root.iterdir() if path.name.isdigit()), default=0)
    (root / str(number)).mkdir()
    return root / str(number)


def discard_submission(output: Path, logs: Path) -> None:
    """The submission with these logs has never been."""
    _submission_path(output).unlink(missing_ok=True)
    shutil.rmtree(logs)
    with suppress(OSError):
        logs.parent.rmdir()  # unless there are others


def _submission_path(output: Path) -> Path:
    return output / output_folder.WORK_FOLDER / SUBMISSION_FILE


def _job_states(output: Path, submission: Submission) -> dict[str, str]:
    """Of each job that Slurm still has: how many of its tasks are in which state."""
    note = f"if they have ended, remove {_submission_path(output)}"
    jobs = ", ".join(submission.jobs.values())
    if shutil.which("squeue") is None:
        raise UserError(f"--output: {output} was given to Slurm's jobs {jobs}, and there is no squeue to ask; {note}")
    asked = subprocess.run(["squeue", "--noheader", "--array", "--format=%F %T"], capture_output=True, text=True)
    if asked.returncode:
        why = " ".join(asked.stderr.split())
        raise UserError(f"--output: {output} was given to Slurm's jobs {jobs}, and squeue fails ({why}); {note}")
    counted = Counter(line for line in asked.stdout.splitlines() if line.split()[0] in submission.jobs.values())
    states: dict[str, str] = {}
    for line, tasks in sorted(counted.items()):
        job, state = line.split()
        states[job] = f"{states[job]} and {tasks} {state.lower()}" if job in states else f"{tasks} {state.lower()}"
    return states
