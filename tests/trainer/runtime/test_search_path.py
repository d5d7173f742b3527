"""The working folder leaves the search path where `python -m` or PYTHONPATH put it."""

import os
import sys

import pytest

from tandem.trainer.runtime.search_path import leave_out_working_folder


@pytest.mark.parametrize(
    ("python_path", "run_by_name", "left", "inherited"),
    [
        (None, False, ["HERE", "HERE", "/lib"], None),
        (None, True, ["HERE", "/lib"], None),
        ("", True, ["HERE", "/lib"], ""),
        ("/more", False, ["HERE", "HERE", "/lib"], "/more"),
        (".", True, ["/lib"], ""),
        (":/more", False, ["HERE", "/lib"], "/more"),
        ("/more:", False, ["HERE", "/lib"], "/more"),
        (".//:..:more", False, ["HERE", "/lib"], "..:more"),
        (":HERE", True, ["HERE", "/lib"], "HERE"),  # asked for with its full path
    ],
)
def test_only_what_python_added_leaves(python_path, run_by_name, left, inherited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    monkeypatch.setattr(sys, "path", [here, here, "/lib"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if python_path is not None:
        monkeypatch.setenv("PYTHONPATH", python_path.replace("HERE", here))
    leave_out_working_folder(run_by_name=run_by_name)
    assert [entry.replace(here, "HERE") for entry in sys.path] == left
    found = os.environ.get("PYTHONPATH")
    assert (found and found.replace(here, "HERE")) == inherited


def test_a_working_folder_that_was_removed_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    leave_out_working_folder(run_by_name=True)
