"""A preparation in jobs: whatever the number of tasks, and whatever was killed, the bytes of one machine."""

import argparse
import random
import sys
from pathlib import Path

import pytest

from tandem.data_prep import input_files, prepare, stages, work_units
from tandem.data_prep.cluster import door, stage_job, submissions
from tandem.data_prep.cluster.stage_job import Request
from tandem.data_prep.cluster.submissions import Submission
from tandem.trainer.config import UserError
from tandem.trainer.disk import whole_file

SETTINGS = ["--sample-tokens", 512, "--shard-tokens", 2000, "--held-out", 0.1, "--vocab", 300, "--deduplicate"]
SQUEUE = """#!/bin/sh
echo "12 RUNNING\n12 PENDING\n12 PENDING\n99 RUNNING"
"""


@pytest.fixture(autouse=True)
def _several_units(monkeypatch):
    monkeypatch.setattr(work_units, "SMALLEST_UNIT_BYTES", 10_000)
    monkeypatch.setattr(stages, "SAMPLE_DOCUMENTS", 1)


@pytest.fixture
def request_of(tmp_path, folder):
    """request_of(name): the request that `tandem prepare` would submit for that output, which is claimed."""

    def made(name: str) -> Request:
        output = tmp_path / name
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        given = ["--input", folder, "--output", output, *SETTINGS]
        arguments = parser.parse_args(list(map(str, given)))
        (output / "work").mkdir(parents=True, exist_ok=True)
        settings = prepare._settings(arguments, None)
        return Request(output, settings, input_files.listed([str(folder)], None, output), None, 300, "tokenizers")

    return made


@pytest.fixture
def expected(prepared, folder, content) -> dict[str, bytes]:
    """The files that one machine makes of it."""
    return content(prepared("local", "--input", folder, *SETTINGS))


def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(expected, request_of, content):
    for tasks in (1, 3):
        request = request_of(f"in {tasks}")
        submitted = stage_job.left(request, tasks)
        assert [(job.name, job.tasks) for job in submitted] == [
            ("train", 1), ("encode", tasks), ("link", tasks), ("arrange", 1), ("gather", tasks), ("finish", 1)
        ]  # fmt: skip
        for job in submitted:
            for rank in random.Random(0).sample(range(job.tasks), job.tasks):
                job.work(rank, job.tasks)
        assert content(request.output) == expected


def test_after_failed_tasks_another_number_of_them_does_what_is_missing(expected, request_of, content):
    request = request_of("jobs")
    train, encode, *_ = stage_job.left(request, 3)
    train.work(0, 1)
    encode.work(1, 3)
    work = request.output / "work"
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.tokens")}
    encode, *others = stage_job.left(request, 2)
    preparation = request.begin()
    assert finished
    assert 1 < len(encode.items) < len(preparation.units)
    encode.work(0, 2)
    finished |= {path: path.stat().st_mtime_ns for path in work.glob("*.tokens")}
    for rank in (1, 0):  # the second is started again
        encode.work(rank, 2)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert [job.name for job in stage_job.left(request, 2)] == ["link", "arrange", "gather", "finish"]
    for job in others:
        for rank in range(job.tasks):
            job.work(rank, job.tasks)
    assert content(request.output) == expected


def test_a_job_that_begins_too_early_says_what_is_missing(request_of):
    train, encode, link, arrange, *_ = stage_job.left(request_of("jobs"), 2)
    with pytest.raises(UserError, match=r"^encode: the tokenizer is not trained; run the same command again$"):
        encode.work(0, 2)
    train.work(0, 1)
    encode.work(0, 2)
    with pytest.raises(UserError, match=r"^link: \d+ of \d+ items of encode miss; run the same command again$"):
        link.work(0, 2)
    encode.work(1, 2)
    link.work(0, 2)
    with pytest.raises(UserError, match=r"^arrange: \d+ of \d+ items of link miss"):
        arrange.work(0, 1)


def test_what_a_task_failed_of_is_one_line_beside_the_logs(request_of, folder, tmp_path, capsys):
    slurm = pytest.importorskip("tandem.data_prep.cluster.slurm", reason="datatrove is not installed")
    (folder / "1" / "bad.jsonl").write_text('{"body": "no text"}\n')
    job = stage_job.left(request_of("jobs"), 1)[0]
    job.write(tmp_path / "train.job")
    with pytest.raises(SystemExit) as ended:
        slurm.Step(tmp_path / "train.job")(None, 0, 1)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "bad.jsonl:1: has no field 'text'" in said
    assert Submission(str(tmp_path), {}).failures() == [f"train-00000: {said.removeprefix('tandem: ').strip()}"]


def test_a_folder_that_jobs_work_in_is_left_alone(request_of, prepared, folder, tmp_path, monkeypatch):
    request = request_of("jobs")
    (request.output / "preparing.json").write_text("{}")
    Submission("logs of them", {"encode": "12", "gather": "13"}).write(request.output)
    before = sorted(request.output.rglob("*"))
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(SQUEUE)
    squeue.chmod(0o755)
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{squeue.parent}:/bin:/usr/bin")
        with pytest.raises(UserError, match=r"prepared by Slurm: encode \(12\) 2 pending and 1 running; run the same"):
            submissions.refuse_running(request.output)
        squeue.write_text("#!/bin/sh\necho no controller >&2; exit 1")
        with pytest.raises(UserError, match=r"squeue fails \(no controller\); if they have ended, remove .*jobs.json"):
            submissions.refuse_running(request.output)
        squeue.write_text("#!/bin/sh")
        submissions.refuse_running(request.output)
        context.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"given to Slurm's jobs 12, 13, and there is no squeue to ask"):
            submissions.refuse_running(request.output)
    assert sorted(request.output.rglob("*")) == before


def test_this_machine_does_not_begin_beside_jobs(prepared, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(work_units, "UNITS", 0)  # a crash of ours, that leaves the folder unfinished
        with pytest.raises(ZeroDivisionError):
            prepared("out", "--input", folder, *SETTINGS)
    output = tmp_path / "out"
    Submission("logs of them", {"encode": "12"}).write(output)
    before = sorted(output.rglob("*"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"given to Slurm's jobs 12, and there is no squeue to ask; if they have ended"):
        prepared("out", "--input", folder, *SETTINGS)
    assert sorted(output.rglob("*")) == before


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as slow:
        slow.write(b"whole")
        with whole_file(path) as quick:
            quick.write(b"whole")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"whole"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", 3], r"--tasks: is for --executor slurm, not local"),
        (["--executor", "ray", "--slurm", "time=5"], r"--slurm: is for --executor slurm, not ray"),
        (["--executor", "slurm", "--slurm", "partition"], r"--slurm: partition; must read NAME=VALUE"),
        (["--executor", "slurm", "--slurm", "array=1-3"], r"--slurm: array=1-3; .* not of array"),
        (["--executor", "slurm", "--tasks", 0], r"--tasks: 0; must be positive"),
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
        UserError, match=rf"needs {library}, which is not installed; pip install 'tandem\[{executor}\]'"
    ):
        door(executor)


def test_logs_lie_beside_the_folder_and_are_numbered(tmp_path):
    output = tmp_path / "corpus"
    assert [submissions.new_logs(output) for _ in range(2)] == [Path(f"{output}.jobs/1"), Path(f"{output}.jobs/2")]
    submissions.forget(output, Path(f"{output}.jobs/2"))
    assert submissions.new_logs(output).name == "2"


def test_a_job_that_is_begun_again_after_the_end_changes_nothing(expected, request_of, content):
    request = request_of("jobs")
    submitted = stage_job.left(request, 2)
    for job in submitted:
        for rank in range(job.tasks):
            job.work(rank, job.tasks)
    for job in submitted:
        job.work(0, job.tasks)
    assert content(request.output) == expected
