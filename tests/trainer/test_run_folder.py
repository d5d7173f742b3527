"""The files of a run folder before and after a start."""

from tandem.trainer import run_folder
from tandem.trainer.disk import atomic_write


def test_what_a_kill_left_half_written_goes_and_nothing_else(tmp_path):
    atomic_write(tmp_path / "report.html", "whole")
    (tmp_path / "manifests").mkdir()
    torn = [tmp_path / "config.yaml.0123abcd.tmp", tmp_path / "manifests" / "a.json.89efffff.tmp"]
    kept = [tmp_path / "notes.tmp", tmp_path / "manifests" / "a.json"]
    for path in (*torn, *kept):
        path.write_text("words")
    run_folder.open_run_folder(tmp_path, "run: {}\n")
    assert not any(path.exists() for path in torn)
    assert [path.read_text() for path in kept] == ["words"] * 2
    assert (tmp_path / "config.yaml").read_text() == "run: {}\n"


def test_without_git_the_commit_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TANDEM_COMMIT", "0123abc")
    assert run_folder.describe_environment()["commit"] == "0123abc"
