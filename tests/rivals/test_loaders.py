"""`python -m tests.rivals.loaders` on a tiny corpus: every column of our loader and the memory map; bad options."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.trainer.data import manifest
from tests.rivals.loaders.__main__ import main
from tests.rivals.loaders.adapter import PassConfig, flat_rows
from tests.rivals.loaders.adapters import ADAPTERS
from tests.rivals.loaders.comparison import LoaderResult
from tests.rivals.loaders.measurement import compare_rows
from tests.rivals.loaders.synthetic_corpus import (
    CORPUS_MULTIPLE_TOKENS,
    EOS_ID,
    ROW_TOKENS,
    SHARDS_FOLDER,
    SyntheticCorpus,
    write_corpus,
)
from tests.timeouts import TEST_TIMEOUT_SECONDS

PLAIN = ["ours", "numpy memmap"]
TOKENS = 2 * CORPUS_MULTIPLE_TOKENS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> SyntheticCorpus:
    made = SyntheticCorpus(tmp_path_factory.mktemp("loaders"), TOKENS)
    write_corpus(made)
    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[LoaderResult], list[str]]:
    """Rows and printed lines of a run. A subprocess: its fork server must not become the tests' fork server."""
    kept = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    arguments = [*PLAIN, "litdata", "--tokens", str(TOKENS + 5), "--json", str(kept)]
    module = ["-m", "tests.rivals.loaders", "--rounds", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *module, *arguments], cwd=root, capture_output=True, text=True, timeout=TEST_TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return [LoaderResult(**json.loads(line)) for line in kept.read_text().splitlines()], done.stdout.splitlines()


def test_a_run_fills_every_column_of_ours_and_the_memory_map(measured):
    rows, (header, *lines) = measured
    assert [row.loader for row in rows] == [line[:26].strip() for line in lines] == [*PLAIN, "litdata"]
    for row in rows[:2]:
        assert min(row.tokens_per_second, row.worker_tokens_per_second, row.resume_seconds) > 0
        assert 2.0 <= row.bytes_per_token < 2.1
        assert 50 * 2**20 < row.peak_bytes < 2**31
        assert (row.same_ranks, row.other_ranks) == ("exact", "exact")
        assert (row.corpus_tokens, row.rounds) == (TOKENS, 1)
    assert header.split()[:2] == ["loader", "Mtok/s"]


@pytest.mark.skipif(find_spec("litdata") is not None, reason="litdata is installed")
def test_a_rival_that_is_not_installed_gets_a_row_with_the_reason(measured):
    line = measured[1][-1]
    assert line.startswith("litdata ")
    assert "not measured: not installed (No module named 'litdata'): pip install -e '.[rivals]'" in line


def test_the_shards_and_the_flat_file_hold_the_same_documents(corpus):
    tokens = corpus.open_tokens()
    found = manifest.load_manifest(corpus.folder / SHARDS_FOLDER)
    manifest.check_shard_files(corpus.folder / SHARDS_FOLDER, found)
    assert len(tokens) == found.train.tokens == TOKENS
    assert len(found.train.shards) >= 3, "a resume and a pass cross shards"
    documents = list(corpus.iterate_documents())
    assert found.train.documents == len(documents) == np.count_nonzero(tokens == EOS_ID)
    assert all(document[-1] == EOS_ID for document in documents)


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")  # webdataset's tars
@pytest.mark.filterwarnings("ignore:.*Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", [*PLAIN, "ours, a block a row", "webdataset, 64 rows", "webdataset, 1 row"])
def test_a_pass_is_every_row_once_in_shuffled_batches_of_eight(name, corpus, tmp_path):
    loader = ADAPTERS[name]
    loader.write_corpus(corpus, tmp_path)
    passes = [list(loader.open_batches(PassConfig(corpus, tmp_path, seed), None).batches) for seed in (0, 1)]
    for batch in passes[0]:
        assert batch.dtype == torch.int64
        assert batch.shape == (8, ROW_TOKENS - loader.is_ours)
    first, second = (torch.cat(batches).tolist() for batches in passes)
    assert first != second
    assert loader.reads_flat_rows == (not loader.is_ours)
    if loader.reads_flat_rows:
        assert sorted(first) == sorted(second) == sorted(flat_rows(corpus).tolist())
        assert first != flat_rows(corpus).tolist()


def test_rows_lost_and_repeated_by_a_resume_are_counted():
    assert compare_rows([1, 2, 3], [1, 2, 3]) == "exact"
    assert compare_rows([1, 2, 3], [1, 3, 2]) == "another order"
    assert compare_rows([1, 2, 3, 4], [1, 1, 1]) == "3 rows lost, 2 repeated"


MISTAKES = {
    "loader": (["mmap"], ["loader: 'mmap' is not known", "numpy memmap", "litdata"]),
    "tokens": (["--tokens", "1000"], ["--tokens: 1000", f"at least {CORPUS_MULTIPLE_TOKENS}"]),
    "rounds": (["--rounds", "0"], ["--rounds: 0", "at least 1"]),
    "json": (["--json", "none/rows.jsonl"], ["--json: none/rows.jsonl", "does not exist"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_option_is_reported_in_one_line(name, capfd):
    arguments, facts = MISTAKES[name]
    assert main(arguments) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tests.rivals.loaders: ")
    assert [part for part in facts if part not in line] == []
