"""Creating a checkpoint's folder, and removing others for it."""

from pathlib import Path

import pytest

from tandem.trainer.checkpoint import write
from tandem.trainer.checkpoint.layout import COMMIT_MARKER, REJECTED_MARKER, step_folder_name


def left(root: Path, step: int, *files: str) -> Path:
    """Make a checkpoint folder with these files."""
    folder = root / step_folder_name(step)
    folder.mkdir()
    for name in files:
        (folder / name).write_text("state")
    return folder


def test_a_save_removes_what_others_left_without_a_commit(tmp_path):
    """A save that was killed, or failed on a read-only disk, may be of an earlier or a later step."""
    kept = [
        left(tmp_path, 4, "rank-00000.safetensors", COMMIT_MARKER),
        left(tmp_path, 9, COMMIT_MARKER),
        left(tmp_path, 8, REJECTED_MARKER),
    ]
    torn = [left(tmp_path, 3, "rank-00000.safetensors"), left(tmp_path, 6, "rank-00000.safetensors"), left(tmp_path, 7)]
    (tmp_path / "notes").mkdir()
    write.prepare_folder(tmp_path / step_folder_name(6))
    assert all(list(folder.iterdir()) for folder in kept)
    assert [folder.exists() for folder in torn] == [False, True, False]
    assert list((tmp_path / step_folder_name(6)).iterdir()) == []
    assert (tmp_path / "notes").exists()


def test_what_cannot_be_removed_stops_no_save(tmp_path, monkeypatch):
    left(tmp_path, 3, "rank-00000.safetensors")

    def refuse(folder: Path) -> None:
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(write, "remove_checkpoint", refuse)
    write.prepare_folder(tmp_path / step_folder_name(6))
    assert (tmp_path / step_folder_name(6)).is_dir()
    with pytest.raises(OSError, match="Read-only"):
        write.prepare_folder(tmp_path / step_folder_name(6))
