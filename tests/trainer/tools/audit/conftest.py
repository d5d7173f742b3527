"""One run with every kind of change, for all tests of the audit."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.tools.audit.runs import make_corpus, write_full_run


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: make_corpus(root / name, seed, documents)
        for name, seed, documents in (("a", 1, 90), ("b", 2, 16), ("c", 3, 40))
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory, sources) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    write_full_run(folder, sources)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of the run that a test can damage."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"
