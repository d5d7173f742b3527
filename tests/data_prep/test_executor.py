"""Processes of this machine end cleanly after a killed worker, an error and Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tandem.data_prep import executor
from tandem.trainer.config import UserError
from tests.data_prep.conftest import file_contents, prepare_small
from tests.hostile_modules import write_hostile_modules
from tests.timeouts import wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from functools import partial
from pathlib import Path

from tandem.data_prep import executor
from tests.data_prep.test_executor import sleeping

if __name__ == "__main__":
    executor.run(partial(sleeping, Path(sys.argv[1])), range(4), 2, lambda count: None)
"""


SMALL = ["--sample-tokens", 512, "--shard-tokens", 512, "--held-out", 0.1, "--vocab-size", 300]


@pytest.fixture(scope="module")
def expected(shared_folder, tmp_path_factory) -> dict[str, bytes]:
    """The files of a preparation that was not stopped."""
    return file_contents(prepare_small(tmp_path_factory.mktemp("expected") / "whole", "--input", shared_folder, *SMALL))


def failing(folder: Path) -> executor.ItemFunction:
    """Item 0 waits until another has begun and fails; the others would take a minute."""

    def do(item: int, advance: executor.ProgressCallback) -> None:
        (folder / str(item)).touch()
        while item == 0 and len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        if item == 0:
            raise UserError("item 0: is wrong; must be right; correct it")
        for _ in range(600):
            time.sleep(0.1)
            advance(1)

    return do


def dying(folder: Path) -> executor.ItemFunction:
    def do(item: int, advance: executor.ProgressCallback) -> None:
        (folder / str(item)).touch()
        executor.note_file(f"file {item}")
        while item == 0 and len(list(folder.iterdir())) < 2:  # both workers have begun
            time.sleep(0.01)
        if item == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return do


def sleeping(folder: Path) -> executor.ItemFunction:
    def do(item: int, advance: executor.ProgressCallback) -> None:
        (folder / str(os.getpid())).touch()
        for _ in range(600):
            time.sleep(0.1)
            advance(1)

    return do


def children(process: int, word: str) -> list[int]:
    """Ids of the children of a process whose command has this word."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found if word in _command(int(child))]


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


@contextmanager
def running(*command: object, folder: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """Run the command in its own process group and end the group afterwards."""
    # No empty entry: Python itself would import from the working folder before any program can prevent it.
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search_path}
    with subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, start_new_session=True, text=True,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_mistake_in_one_worker_stops_the_others_soon(tmp_path):
    begun = time.monotonic()
    with pytest.raises(UserError, match="item 0: is wrong"):
        executor.run(partial(failing, tmp_path), range(9), 2, lambda count: None)
    assert time.monotonic() - begun < 20  # most of it the start of two processes
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_a_killed_worker_ends_the_others_in_one_line(tmp_path):
    with pytest.raises(
        UserError,
        match="--workers: one of 2 workers was killed while it read file 0, probably because memory ran out; run the same",
    ):
        executor.run(partial(dying, tmp_path), range(4), 2, lambda count: None)


@pytest.mark.parametrize("error", [OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")])
def test_a_worker_killed_while_another_begins_is_the_same(error, monkeypatch, tmp_path):
    """concurrent.futures raises these where it starts the other, a few times in a thousand."""

    class Torn(ProcessPoolExecutor):
        def submit(self, *call):
            if self._processes:
                raise error
            return super().submit(*call)

    monkeypatch.setattr(executor, "ProcessPoolExecutor", Torn)
    with pytest.raises(UserError, match="one of 2 workers was killed"):
        executor.run(partial(failing, tmp_path), range(4), 2, lambda count: None)
    assert not multiprocessing.active_children()


def test_an_interrupt_leaves_no_process(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "begun"
    script.write_text(SCRIPT)
    folder.mkdir()
    with running(script, folder) as process:
        wait_until(lambda: len(list(folder.iterdir())) == 2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.communicate(timeout=20)
    workers = [int(path.name) for path in folder.iterdir()]
    assert len(workers) == 2
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 5)


def test_a_preparation_whose_worker_was_killed_continues_to_the_same_bytes(
    prepared, shared_folder, expected, content, tmp_path
):
    arguments = ["--input", shared_folder, *SMALL]
    output = tmp_path / "killed"
    write_hostile_modules(tmp_path / "here", leave_out=("tandem",))  # which its workers must not import
    command = ["-m", "tandem.trainer", "prepare", "--output", output, *arguments, "--workers", 2]
    with running(*command, folder=tmp_path / "here") as process:
        wait_until(lambda: children(process.pid, "spawn_main"))
        os.kill(children(process.pid, "spawn_main")[0], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "one of 2 workers was killed" in said
    assert len(said.splitlines()) == 1, said
    finished = {path: path.stat().st_mtime_ns for path in (output / "work").glob("*.json")}
    assert finished
    assert prepared("killed", *arguments) == output
    assert content(output) == expected


def refusing() -> executor.ItemFunction:
    raise UserError("tokenizer: is not there; must be; restore it")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_reason_that_a_worker_cannot_begin_is_raised(workers):
    with pytest.raises(UserError, match="tokenizer: is not there"):
        executor.run(refusing, range(4), workers, lambda count: None)


def interrupting() -> executor.ItemFunction:
    def do(item: int, advance: executor.ProgressCallback) -> None:
        if item == 1:
            os.kill(os.getppid(), signal.SIGINT)

    return do


def test_an_interrupt_while_the_last_items_end_is_not_lost():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        executor.run(interrupting, range(2), 2, lambda count: None)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("delay_seconds", [0.0, 0.02, 0.1])
def test_an_interrupted_preparation_is_one_line_and_continues(
    prepared, shared_folder, expected, content, tmp_path, delay_seconds
):
    arguments = ["--input", shared_folder, *SMALL]
    output = tmp_path / "interrupted"
    with running("-m", "tandem.trainer", "prepare", "--output", output, *arguments, "--workers", 2) as process:
        wait_until(lambda: children(process.pid, "spawn_main"))
        time.sleep(delay_seconds)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert [line for line in said.splitlines() if line.startswith("tandem: ")] == [
        f"tandem: interrupted; finished work is kept in {output}; run the same command again to continue"
    ]
    assert "Traceback" not in said
    assert prepared("interrupted", *arguments) == output
    assert content(output) == expected
