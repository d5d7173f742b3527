"""A preparation in jobs gives the bytes of one machine, whatever the number of tasks and whatever was killed."""

import argparse
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.data_prep import input_files, output_folder, prepare, stages, work_files, work_units
from tandem.data_prep.cluster import executor_module, stage_job, submissions
from tandem.data_prep.cluster.submissions import Submission
from tandem.data_prep.stages import PreparationRequest
from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_file
from tests.data_prep.conftest import file_contents, prepare_small

SETTINGS = ["--sample-tokens", 512, "--shard-tokens", 2000, "--held-out", 0.1, "--vocab-size", 300, "--deduplicate"]
SQUEUE = """#!/bin/sh
echo "12 RUNNING\n12 PENDING\n12 PENDING\n99 RUNNING"
"""


@pytest.fixture(autouse=True, scope="module")
def _several_units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_units, "MIN_UNIT_BYTES", 10_000)
        patch.setattr(stages, "CHECK_SAMPLE_DOCUMENTS", 1)
        yield


@pytest.fixture(scope="module")
def expected(_several_units, shared_folder, tmp_path_factory) -> dict[str, bytes]:
    """The files that one machine writes."""
    return file_contents(prepare_small(tmp_path_factory.mktemp("local") / "out", "--input", shared_folder, *SETTINGS))


@pytest.fixture
def folder(shared_folder):
    return shared_folder


@pytest.fixture
def request_of(tmp_path, folder):
    """request_of(name): the request that `tandem prepare` would submit for that output."""

    def made(name: str, folder: Path = folder) -> PreparationRequest:
        output = tmp_path / name
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        given = ["--input", folder, "--output", output, *SETTINGS]
        arguments = parser.parse_args(list(map(str, given)))
        (output / "work").mkdir(parents=True, exist_ok=True)
        settings = prepare._settings(arguments, None)
        return PreparationRequest(
            output, settings, input_files.list_input_files([str(folder)], None, output), None, 300, "tokenizers"
        )

    return made


def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(expected, request_of, content):
    for tasks in (1, 3):
        request = request_of(f"in {tasks}")
        submitted = stage_job.plan_jobs(request, tasks)
        assert [(job.name, job.num_tasks) for job in submitted] == [
            ("train-tokenizer", 1),
            ("encode", tasks),
            ("find-duplicates", tasks),
            ("plan-shards", 1),
            ("gather", tasks),
            ("finish", 1),
        ]
        for job in submitted:
            for rank in random.Random(0).sample(range(job.num_tasks), job.num_tasks):
                job.run_task(rank, job.num_tasks)
        assert content(request.output) == expected


def test_after_failed_tasks_another_number_of_them_does_what_is_missing(expected, request_of, content):
    request = request_of("jobs")
    train, encode, *_ = stage_job.plan_jobs(request, 3)
    train.run_task(0, 1)
    encode.run_task(1, 3)
    work = request.output / "work"
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.tokens")}
    encode, *others = stage_job.plan_jobs(request, 2)
    preparation = request.create_preparation()
    assert finished
    assert 1 < len(encode.items) < len(preparation.units)
    encode.run_task(0, 2)
    finished |= {path: path.stat().st_mtime_ns for path in work.glob("*.tokens")}
    for rank in (1, 0):  # the second is started again
        encode.run_task(rank, 2)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert [job.name for job in stage_job.plan_jobs(request, 2)] == [
        "find-duplicates",
        "plan-shards",
        "gather",
        "finish",
    ]
    for job in others:
        for rank in range(job.num_tasks):
            job.run_task(rank, job.num_tasks)
    assert content(request.output) == expected


def test_a_job_that_begins_too_early_reports_what_is_missing(request_of):
    train, encode, find_duplicates, plan_shards, *_ = stage_job.plan_jobs(request_of("jobs"), 2)
    with pytest.raises(UserError, match=r"^encode: the tokenizer is not trained; run the same command again$"):
        encode.run_task(0, 2)
    train.run_task(0, 1)
    encode.run_task(0, 2)
    with pytest.raises(
        UserError, match=r"^find-duplicates: \d+ of \d+ items of encode are missing; run the same command again$"
    ):
        find_duplicates.run_task(0, 2)
    encode.run_task(1, 2)
    find_duplicates.run_task(0, 2)
    with pytest.raises(UserError, match=r"^plan-shards: \d+ of \d+ items of find-duplicates are missing"):
        plan_shards.run_task(0, 1)


def test_a_failed_task_writes_its_error_line_next_to_the_logs(request_of, folder, tmp_path, capsys):
    slurm = pytest.importorskip("tandem.data_prep.cluster.slurm", reason="datatrove is not installed")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "1" / "bad.jsonl").write_text('{"body": "no text"}\n')
    job = stage_job.plan_jobs(request_of("jobs", damaged), 1)[0]
    (tmp_path / "train.job").write_bytes(pickle.dumps(job))
    with pytest.raises(SystemExit) as ended:
        slurm.TaskStep(tmp_path / "train.job")(None, 0, 1)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "bad.jsonl:1: has no field 'text'" in said
    assert Submission(str(tmp_path), {}).failure_lines() == [f"train-00000: {said.removeprefix('tandem: ').strip()}"]


def test_a_folder_that_jobs_work_in_is_left_alone(request_of, prepared, folder, tmp_path, monkeypatch):
    request = request_of("jobs")
    work_files.write_record(request.output / "preparing.json", output_folder.Claim({}))
    Submission("logs of them", {"encode": "12", "gather": "13"}).save(request.output)
    before = sorted(request.output.rglob("*"))
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(SQUEUE)
    squeue.chmod(0o755)
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{squeue.parent}:/bin:/usr/bin")
        with pytest.raises(UserError, match=r"prepared by Slurm: encode \(12\) 2 pending and 1 running; run the same"):
            submissions.check_no_running_jobs(request.output)
        squeue.write_text("#!/bin/sh\necho no controller >&2; exit 1")
        with pytest.raises(
            UserError, match=r"squeue fails \(no controller\); if the jobs have ended, remove .*jobs.json"
        ):
            submissions.check_no_running_jobs(request.output)
        squeue.write_text("#!/bin/sh")
        submissions.check_no_running_jobs(request.output)
        context.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"belongs to the Slurm jobs 12, 13, and squeue is not on PATH"):
            submissions.check_no_running_jobs(request.output)
    assert sorted(request.output.rglob("*")) == before


def test_this_machine_does_not_begin_beside_jobs(prepared, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(work_units, "TARGET_NUM_UNITS", 0)  # a crash that leaves the folder unfinished
        with pytest.raises(ZeroDivisionError):
            prepared("out", "--input", folder, *SETTINGS)
    output = tmp_path / "out"
    Submission("logs of them", {"encode": "12"}).save(output)
    before = sorted(output.rglob("*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"belongs to the Slurm jobs 12, and squeue is not on PATH; if the jobs have ended"
    ):
        prepared("out", "--input", folder, *SETTINGS)
    assert sorted(output.rglob("*")) == before


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as slow:
        slow.write(b"whole")
        with atomic_file(path) as quick:
            quick.write(b"whole")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"whole"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", 3], r"--tasks: this option has no effect with --executor local; leave it out, or choose slurm"),
        (
            ["--executor", "ray", "--slurm", "time=5"],
            r"--slurm: this option has no effect with --executor ray; leave it out, or choose slurm",
        ),
        (
            ["--executor", "slurm", "--slurm", "partition"],
            r"--slurm: partition is not a valid option; write NAME=VALUE without leading dashes",
        ),
        (
            ["--executor", "slurm", "--slurm", "array=1-3"],
            r"--slurm: array=1-3 is not a valid option; .* NAME must not be one of array",
        ),
        (["--executor", "slurm", "--tasks", 0], r"--tasks: 0 is too small; use 1 or more"),
    ],
)
def test_options_of_another_executor_are_refused(prepared, folder, arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        prepared("out", "--input", folder, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("executor", "library"), [("slurm", "datatrove"), ("ray", "ray")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, executor, library):
    for name in {library, *(name for name in sys.modules if name.startswith(f"{library}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"tandem.data_prep.cluster.{executor}", raising=False)
    with pytest.raises(
        UserError, match=rf"needs {library}, which is not installed; run pip install 'tandem\[{executor}\]'"
    ):
        executor_module(executor)


def test_logs_are_next_to_the_folder_and_numbered(tmp_path):
    output = tmp_path / "corpus"
    assert [submissions.create_logs_folder(output) for _ in range(2)] == [
        Path(f"{output}.jobs/1"),
        Path(f"{output}.jobs/2"),
    ]
    submissions.discard_submission(output, Path(f"{output}.jobs/2"))
    assert submissions.create_logs_folder(output).name == "2"


SBATCH = """#!/bin/sh
for script; do :; done
cp "$script" "$0.$(ls "$0".* 2>/dev/null | wc -l)"
echo Submitted batch job 12
"""
SRUN = """#!/bin/sh
while [ "$1" = -l ] || [ "$1" = -n ] || [ "$1" = 1 ]; do shift; done
exec "$@"
"""


def test_a_task_unpickles_only_files_that_no_other_user_can_have_made(request_of, tmp_path, monkeypatch):
    slurm = pytest.importorskip("tandem.data_prep.cluster.slurm", reason="datatrove is not installed")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/sh\necho node\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    request = request_of("jobs of mine")
    previous_umask = os.umask(0o002)  # of users whose group is their own
    try:
        logs = Path(slurm.submit(request, tasks=2, workers=None, options={}).logs)
    finally:
        os.umask(previous_umask)
    train = logs / "train-tokenizer" / "executor.pik"
    assert {path.stat().st_mode & 0o777 for path in (*logs.glob("*.job"), train)} == {0o600}
    assert logs.parent.stat().st_mode & 0o777 == 0o700
    command = ["bash", str(commands / "sbatch.0")]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_NODELIST", "node")
    subprocess.run(command, check=True, capture_output=True)
    assert request.has_tokenizer
    (tmp_path / "bad.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    attack = f"import runpy\nrunpy.run_path({str(tmp_path / 'bad.py')!r})"
    train.write_bytes(f"cbuiltins\nexec\n(V{attack.encode('unicode-escape').decode()}\ntR.".encode())
    if os.geteuid() == 0:
        os.chown(train, 65534, 65534)
    else:
        train.chmod(0o666)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"tandem: {train}: is not a file of this user only" in ended.stderr
    with pytest.raises(PermissionError):
        slurm.run_pickled_array(train)
    job = logs / "encode.job"
    job.chmod(0o622)
    with pytest.raises(PermissionError):
        slurm.TaskStep(job)(None, 0, 1)
    assert not (tmp_path / "ran").exists()


def test_jobs_are_not_written_to_a_folder_of_another_user(tmp_path):
    (tmp_path / "corpus.jobs").mkdir()
    (tmp_path / "corpus.jobs").chmod(0o777)
    with pytest.raises(UserError, match=rf"^--output: .* {tmp_path}/corpus.jobs is writable by other users"):
        submissions.create_logs_folder(tmp_path / "corpus")
    (tmp_path / "other.jobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^--output: .* {tmp_path}/other.jobs is a link"):
        submissions.create_logs_folder(tmp_path / "other")


def test_a_job_restarted_after_the_end_changes_nothing(expected, request_of, content):
    request = request_of("jobs")
    submitted = stage_job.plan_jobs(request, 2)
    for job in submitted:
        for rank in range(job.num_tasks):
            job.run_task(rank, job.num_tasks)
    for job in submitted:
        job.run_task(0, job.num_tasks)
    assert content(request.output) == expected
