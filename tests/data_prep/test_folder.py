"""Two preparations at a time never cost one of them its corpus."""

import errno
import fcntl
import os

import pytest

from data_prep import folder as output_folder
from trainer.config import UserError
from trainer.data import manifest


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path, folder, prepared):
    output = tmp_path / "out"
    output.mkdir()
    handle = os.open(output, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="being prepared by another process"):
            prepared("out", "--input", folder)
    finally:
        os.close(handle)
    assert list(output.iterdir()) == []


def test_a_corpus_finished_meanwhile_is_left_as_it_is(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / manifest.FILE).write_text("{}")
    (output / output_folder.NOTE).write_text("{}")  # the first process is about to remove it
    (output / "train-000000.tar").write_text("tokens")
    with pytest.raises(UserError), output_folder.claimed(output, {}):
        raise UserError("stopped")
    assert (output / "train-000000.tar").read_text() == "tokens"


def test_a_failed_preparation_leaves_a_finished_neighbour(tmp_path):
    def prepare():
        with output_folder.claimed(tmp_path / "data" / "one", {}):
            (tmp_path / "data" / "two").mkdir()
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        prepare()
    assert not (tmp_path / "data" / "one").exists()
    assert (tmp_path / "data" / "two").is_dir()


def test_an_error_of_another_file_is_not_blamed_on_the_output(tmp_path):
    def prepare(error):
        with output_folder.claimed(tmp_path / "out", {}):
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out" / "work"))
    for error in (full, denied):
        with pytest.raises(UserError, match=r"--output: .*out cannot be written \("):
            prepare(error)
    with pytest.raises(
        UserError, match=r"^ConnectionError: no server at 10.0.0.1; correct it and run the same command"
    ):
        prepare(ConnectionError("no server\nat 10.0.0.1"))
