"""Run each stage as a Slurm job array that starts after the previous one, with datatrove's executor.

datatrove writes the script, submits it and starts the tasks. Its statistics job and its default sbatch options are left out.
"""

import os
import pickle
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dill
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import logger

from tandem.data_prep import output_folder
from tandem.data_prep.cluster import stage_job, submissions
from tandem.data_prep.cluster.stage_job import StageJob
from tandem.data_prep.cluster.submissions import Submission
from tandem.data_prep.stages import PreparationRequest
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.runtime.private_folder import open_private_file, set_private_folders

USER_ERROR_EXIT_CODE = 2


@dataclass(frozen=True)
class TaskStep:
    """The pipeline step that datatrove calls in every task."""

    job_path: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Process the items of this task. After an error, write the error line next to the logs and exit."""
        with open(self.job_path, "rb", opener=open_private_file) as file:
            job: StageJob = pickle.load(file)
        try:
            job.run_task(rank, world_size)
        except (UserError, OSError) as error:
            line = str(error) if isinstance(error, UserError) else f"{job.request.output}: {error}"
            line = escape_control_characters(line, one_line=True)
            failed = self.job_path.with_name(f"{self.job_path.stem}-{rank:05d}{submissions.FAILED_SUFFIX}")
            with suppress(OSError):  # the disk may be full
                failed.write_text(f"{line}\n", encoding="utf-8", errors="backslashreplace")
            print(f"tandem: {line}", file=sys.stderr, flush=True)
            raise SystemExit(USER_ERROR_EXIT_CODE) from None


class JobArray(SlurmPipelineExecutor):
    """datatrove's executor without its statistics job and its default options."""

    def launch_merge_stats(self) -> None:
        """Submit nothing."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Return the options that have a value."""
        given: dict[str, Any] = super().get_sbatch_args(max_array)
        if {"mem", "mem-per-gpu"} & given.keys():
            del given["mem-per-cpu"]
        return {name: value for name, value in given.items() if value is not None}

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Return the script of the job, whose tasks run `run_pickled_array` instead of datatrove's command."""
        pickled_array = Path(self.logging_dir.resolve_paths("executor.pik"))
        pickled_array.chmod(0o600)
        command = ["srun", "-l", "-n", "1", sys.executable, "-P", "-m", __name__, str(pickled_array)]
        script: str = super().get_launch_file_contents(sbatch_args, shlex.join(command))
        return script


def submit(request: PreparationRequest, *, tasks: int, workers: int | None, options: Mapping[str, str]) -> Submission:
    """Submit jobs for all unfinished work and record them as owners of the folder.

    Raises: UserError if a job cannot be submitted. All jobs of the submission are then cancelled.
    """
    logger.disable("datatrove")
    (request.output / output_folder.WORK_FOLDER).mkdir(exist_ok=True)
    logs = submissions.create_logs_folder(request.output)
    job_ids: dict[str, str] = {}
    for job in stage_job.plan_jobs(request, tasks):
        with open(logs / f"{job.name}.job", "xb", opener=open_private_file) as file:
            file.write(pickle.dumps(job))
        array = _make_job_array(job, logs, workers, options, depends_on_job_id=next(reversed(job_ids.values()), None))
        captured_stderr: Callable[[], str] = str
        try:
            with _capture_stderr() as captured_stderr:
                array.launch_job()
            job_ids[job.name] = array.job_id
            Submission(str(logs), job_ids).save(request.output)
        except BaseException as error:
            # An unrecorded job would work in the folder at the same time as those of the next submission.
            if known := {*job_ids.values()} | {array.job_id} - {None, ""}:
                subprocess.run(["scancel", *sorted(known)], check=False)
            submissions.discard_submission(request.output, logs)
            if not isinstance(error, (OSError, subprocess.CalledProcessError)):
                raise
            why = " ".join((captured_stderr() or str(error)).split())
            raise UserError(
                f"--executor: slurm could not submit the job {job.name} ({why}); solve the problem, or change --slurm"
            ) from None
    return Submission(str(logs), job_ids)


def _make_job_array(
    job: StageJob, logs: Path, workers: int | None, options: Mapping[str, str], depends_on_job_id: str | None
) -> JobArray:
    return JobArray(
        [TaskStep(logs / f"{job.name}.job")], tasks=job.num_tasks, max_array_size=job.num_tasks,
        workers=-1 if workers is None else workers, job_name=f"tandem-{job.name}", logging_dir=str(logs / job.name),
        skip_completed=False, time=None, partition=None, qos=None, depends_job_id=depends_on_job_id,
        # Otherwise a job whose predecessor has failed waits forever.
        sbatch_args={"kill-on-invalid-dep": "yes", **options},
        # Tasks run this Python and its packages.
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
    )  # fmt: skip


def run_pickled_array(path: Path) -> None:
    """Run this task of the job array that datatrove has pickled, if no other user can have made the file."""
    set_private_folders()  # sbatch exports the variables of the machine that submitted the job
    with open(path, "rb", opener=open_private_file) as file:
        array = dill.load(file)
    array.run()


@contextmanager
def _capture_stderr() -> Iterator[Any]:
    """Capture what programs print to stderr inside the block. The yielded function returns it."""
    original_fd = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        text: list[str] = []
        try:
            yield lambda: "".join(text)
        finally:
            os.dup2(original_fd, 2)
            os.close(original_fd)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


if __name__ == "__main__":
    try:
        run_pickled_array(Path(sys.argv[1]))
    except (UserError, PermissionError) as error:
        line = error if isinstance(error, UserError) else f"{error.filename}: {error.strerror}"
        print(f"tandem: {line}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT_CODE)
