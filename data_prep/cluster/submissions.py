"""Record the jobs that prepare a folder, their states and their errors.

A lock on a folder belongs to one process on one machine, but jobs outlive the command that submits them. Therefore a file
in the folder of unfinished work records them. Logs are next to the output folder, because the folder of a finished corpus
contains only the corpus.
"""

import shutil
import subprocess
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tandem.data_prep import output_folder, work_files
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import read_file
from tandem.trainer.runtime.private_folder import private_folder

SUBMISSION_FILE = "jobs.json"
RESERVED_SBATCH_OPTIONS = ("array", "dependency", "export", "output", "error", "wrap")
"""Options of sbatch that the user must not set."""
FAILED_SUFFIX = ".failed"
"""Suffix of the file next to the logs that contains the error line of a task."""


@dataclass(frozen=True)
class Submission:
    """Jobs that were submitted together: the folder of their logs, and their ids by stage, in order."""

    logs: str
    jobs: dict[str, str]

    def save(self, output: Path) -> None:
        """Record these jobs as the owners of the output folder."""
        work_files.write_record(_submission_path(output), self)

    def failure_lines(self) -> list[str]:
        """Return `stage-rank: line` for every task that ended with an error line."""
        paths = sorted(Path(self.logs).glob(f"*{FAILED_SUFFIX}"))
        return [f"{path.stem}: {read_file(path).decode(errors='replace').strip()}" for path in paths]


def load_submission(output: Path) -> Submission | None:
    """Load the last submission for this folder, if the corpus is unfinished.  Raises: DamagedWork."""
    path = _submission_path(output)
    remedy = f"if no job of this folder is in squeue, remove {path} and run the same command again"
    return work_files.read_record(path, Submission, remedy) if path.exists() else None


def check_no_running_jobs(output: Path) -> None:
    """Check that no pending or running job prepares this folder.  Raises: UserError with the states of such jobs."""
    submission = load_submission(output)
    states = _job_states(output, submission) if submission else {}
    if submission and states:
        jobs = ", ".join(f"{stage} ({job}) {states[job]}" for stage, job in submission.jobs.items() if job in states)
        raise UserError(
            f"--output: {output} is being prepared by Slurm: {jobs}; run the same command again when the jobs have ended, or "
            f"cancel them with scancel; logs: {submission.logs}"
        )


def create_logs_folder(output: Path) -> Path:
    """Create a new folder for the logs of one submission, next to the output.

    It also holds the jobs, which their tasks unpickle.  Raises: UserError if another user can change it.
    """
    try:
        root = private_folder(output.with_name(f"{output.name}.jobs"))
    except UserError as error:
        raise UserError(f"--output: the jobs would run code from a folder that is not safe: {error}") from None
    number = 1 + max((int(path.name) for path in root.iterdir() if path.name.isdigit()), default=0)
    (root / str(number)).mkdir(0o700)
    return root / str(number)


def discard_submission(output: Path, logs: Path) -> None:
    """Remove the record and the logs of a submission."""
    _submission_path(output).unlink(missing_ok=True)
    shutil.rmtree(logs)
    with suppress(OSError):
        logs.parent.rmdir()  # fails if it contains the logs of other submissions


def _submission_path(output: Path) -> Path:
    return output / output_folder.WORK_FOLDER / SUBMISSION_FILE


def _job_states(output: Path, submission: Submission) -> dict[str, str]:
    """Return the number of tasks in each state for every job that has not ended."""
    note = f"if the jobs have ended, remove {_submission_path(output)}"
    jobs = ", ".join(submission.jobs.values())
    if shutil.which("squeue") is None:
        raise UserError(f"--output: {output} belongs to the Slurm jobs {jobs}, and squeue is not on PATH; {note}")
    asked = subprocess.run(["squeue", "--noheader", "--array", "--format=%F %T"], capture_output=True, text=True)
    if asked.returncode:
        why = " ".join(asked.stderr.split())
        raise UserError(f"--output: {output} belongs to the Slurm jobs {jobs}, and squeue fails ({why}); {note}")
    counted = Counter(line for line in asked.stdout.splitlines() if line.split()[0] in submission.jobs.values())
    states: dict[str, str] = {}
    for line, tasks in sorted(counted.items()):
        job, state = line.split()
        states[job] = f"{states[job]} and {tasks} {state.lower()}" if job in states else f"{tasks} {state.lower()}"
    return states
