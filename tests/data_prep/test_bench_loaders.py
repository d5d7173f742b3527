"""`python -m tandem.data_prep.bench.loaders` on a tiny corpus: ours and the memory map, every column measured; its mistakes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.data_prep.bench.loaders.__main__ import main
from tandem.data_prep.bench.loaders.adapter import PassConfig, flat_rows
from tandem.data_prep.bench.loaders.adapters import ADAPTERS
from tandem.data_prep.bench.loaders.comparison import LoaderResult
from tandem.data_prep.bench.loaders.measurement import compare_rows
from tandem.data_prep.bench.loaders.synthetic_corpus import (
    CORPUS_MULTIPLE_TOKENS,
    EOS_ID,
    ROW_TOKENS,
    SHARDS_FOLDER,
    SyntheticCorpus,
    write_corpus,
)
from tandem.trainer.data import manifest
from tests.timeouts import TEST_TIMEOUT_SECONDS

PLAIN = ["ours", "numpy memmap"]
TOKENS = 2 * CORPUS_MULTIPLE_TOKENS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loaders")


@pytest.fixture(scope="module")
def corpus(folder) -> SyntheticCorpus:
    made = SyntheticCorpus(folder, TOKENS, 0)
    write_corpus(made)
    return made


def measured(corpus: SyntheticCorpus, *arguments: str) -> list[str]:
    """The lines it prints. A process of its own: the server its processes are forked from must not become the tests'."""
    module = ["-m", "tandem.data_prep.bench.loaders", "--rounds", "1", "--folder", str(corpus.folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *module, *arguments], cwd=root, capture_output=True, text=True, timeout=TEST_TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_fills_every_column_of_ours_and_the_memory_map(corpus):
    kept = corpus.folder / "rows.jsonl"
    header, *lines = measured(corpus, *PLAIN, "--tokens", str(TOKENS + 5), "--json", str(kept))
    rows = [LoaderResult(**json.loads(line)) for line in kept.read_text().splitlines()]
    assert [row.loader for row in rows] == PLAIN
    for row in rows:
        assert min(row.tokens_per_second, row.worker_tokens_per_second, row.resume_seconds) > 0
        assert 2.0 <= row.bytes_per_token < 2.1
        assert 50 * 2**20 < row.peak_bytes < 2**31
        assert (row.same_ranks, row.other_ranks) == ("exact", "exact")
        assert (row.corpus_tokens, row.rounds) == (TOKENS, 1)
    assert header.split()[:2] == ["loader", "Mtok/s"]
    assert [line[:26].strip() for line in lines] == PLAIN


@pytest.mark.skipif(find_spec("litdata") is not None, reason="litdata is installed")
def test_a_rival_that_is_not_installed_is_a_row_that_says_so(corpus):
    _, line = measured(corpus, "litdata", "--tokens", str(TOKENS))
    assert line.startswith("litdata ")
    assert "not measured: not installed (No module named 'litdata'): pip install 'tandem[bench]'" in line


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


def test_what_a_resume_loses_and_repeats_is_counted():
    assert compare_rows([1, 2, 3], [1, 2, 3]) == "exact"
    assert compare_rows([1, 2, 3], [1, 3, 2]) == "another order"
    assert compare_rows([1, 2, 3, 4], [1, 1, 1]) == "3 rows lost, 2 repeated"


MISTAKES = {
    "loader": (["mmap"], ["loader: 'mmap'", "numpy memmap", "litdata"]),
    "tokens": (["--tokens", "1000"], ["--tokens: 1000", f"at least {CORPUS_MULTIPLE_TOKENS}"]),
    "rounds": (["--rounds", "0"], ["--rounds: 0", "at least 1"]),
    "json": (["--json", "none/rows.jsonl"], ["--json: none/rows.jsonl", "does not exist"]),
    "folder": (["--folder", "none/below"], ["--folder: none/below", "does not exist"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, capfd):
    arguments, said = MISTAKES[name]
    assert main(arguments) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tandem.data_prep.bench.loaders: ")
    assert [part for part in said if part not in line] == []


def test_another_corpus_in_the_folder_is_refused(corpus, capfd):
    assert main(["ours", "--tokens", str(CORPUS_MULTIPLE_TOKENS), "--folder", str(corpus.folder)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "holds a corpus of" in line
