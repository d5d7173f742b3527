"""Files are written completely or keep their old content."""

import pytest

from tandem.trainer.disk import atomic_file, atomic_write


def test_a_file_that_cannot_be_finished_is_what_it_was(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "before")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.write("after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
