"""`python -m tests.rivals.data_prep` on little text: our pipeline and the reference, their ids compared; bad options."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandem.data_prep.tokenizers import build
from tests.rivals.data_prep import tokenizer_libraries
from tests.rivals.data_prep.__main__ import main
from tests.rivals.data_prep.comparison import PipelineResult
from tests.rivals.data_prep.pipelines import PIPELINES, REFERENCE_PIPELINE, count_differing, count_document_hashes
from tests.rivals.data_prep.text_files import gather_text, read_documents

OURS = "tandem prepare"
WORDS = ["the", "of", "and", "row", "shard", "1", "23", "def", "return", "(", ")", ":", "naïve", "漢字", "🙂\n"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(WORDS, rng.integers(60, 900))))
    (folder / "copy.txt").write_text((folder / "7.txt").read_text())
    (folder / "binary.txt").write_bytes(b"\xff" * 100)
    (folder / "short.txt").write_text("short")
    return folder


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(
        build.train_bpe((path.read_text() for path in sorted(source.glob("?.txt"))), 400, tokenizer_libraries.EOS)
    )
    return path


def test_a_run_compares_all_ids_and_reports_the_cost_of_each_pipeline(source, tokenizer, tmp_path, capfd):
    kept = tmp_path / "rows.jsonl"
    options = ["--input", str(source), "--tokenizer", str(tokenizer), "--rounds", "1", "--json", str(kept)]
    assert main([OURS, REFERENCE_PIPELINE, *options]) == 0
    rows = {
        (row.pipeline, row.part): row
        for row in (PipelineResult(**json.loads(line)) for line in kept.read_text().splitlines())
    }
    assert list(rows) == [(name, part) for part in ("whole", "tokenizing") for name in (OURS, REFERENCE_PIPELINE)]
    text_bytes = sum(len(text.encode()) for text in texts_of(source))
    for (_, part), row in rows.items():
        assert row.text_bytes == text_bytes
        assert min(row.seconds, row.cpu_seconds, row.bytes_per_second, row.bytes_per_cpu_second) > 0
        assert 10 * 2**20 < row.peak_bytes < 2**31
        compared = (0, 60) if part == "whole" else (None, None)
        assert (row.differing_documents, row.compared_documents) == compared
    first, header, *lines = capfd.readouterr().out.splitlines()
    assert "60 documents" in first
    assert header.split()[0] == "pipeline"
    assert [line[:22].strip() for line in lines] == [name for name, _ in rows]


def texts_of(source: Path) -> list[str]:
    return sorted(path.read_text() for path in source.glob("[0-9]*.txt"))


def test_a_rival_that_is_not_installed_gets_a_row_with_the_reason(source, tokenizer, monkeypatch, capfd):
    monkeypatch.setitem(
        PIPELINES, "absent", replace(PIPELINES["datatrove"], name="absent", required_module="no_such_module")
    )
    assert main(["absent", "--input", str(source), "--tokenizer", str(tokenizer), "--rounds", "1"]) == 0
    line = capfd.readouterr().out.splitlines()[-1]
    assert "not measured: no_such_module is not installed: pip install -e '.[rivals]'" in line


def test_every_text_is_gathered_once(source, tmp_path):
    text = gather_text(tmp_path / "text", [source], 200.0)
    assert sorted(read_documents(text.paths)) == texts_of(source)
    assert sum(text.documents) == 60


def test_a_subset_is_the_first_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.rivals.data_prep.text_files.FILE_MB", 0.02)
    text = gather_text(tmp_path / "text", [source], 200.0)
    share = text.subset(0.05, tmp_path / "share")
    assert 1 < len(share.names) < len(text.names)
    assert list(read_documents(share.paths)) == list(read_documents(text.paths))[: sum(share.documents)]
    assert 50_000 <= sum(share.bytes) < 100_000


def test_a_document_with_another_id_is_counted():
    reference = count_document_hashes([np.array([1, 2, 3]), np.array([4]), np.array([4])])
    same, one_other, one_missing = ([[4], [1, 2, 3], [4]], [[4], [1, 2, 9], [4]], [[4], [1, 2, 3]])
    for documents, differing in ((same, 0), (one_other, 1), (one_missing, 1)):
        assert count_differing(reference, count_document_hashes(map(np.array, documents)), same_text=True) == differing
    more = reference + Counter(count_document_hashes([np.array([7])]))
    assert count_differing(reference, more, same_text=False) == 0
    assert count_differing(reference, more, same_text=True) == 1


def test_ranks_are_the_bytes_of_the_tokens(tokenizer):
    tree = json.loads(tokenizer.read_text())
    ranks, specials = tokenizer_libraries.mergeable_ranks(tree)
    assert {bytes([value]) for value in range(256)} <= ranks.keys()
    assert len(ranks) + len(specials) == len(tree["model"]["vocab"])
    assert list(specials) == [tokenizer_libraries.EOS]
    joined = {tuple(merge) for merge in tree["model"]["merges"]}
    assert len(joined) == len(ranks) - 256


MISTAKES = {
    "pipeline": (["sentencepiece"], ["pipeline: 'sentencepiece' is not known", "tandem prepare", "datatrove"]),
    "mb": (["--mb", "0"], ["--mb: 0.0", "at least 0.001"]),
    "workers": (["--workers", "0"], ["--workers: 0", "at least 1"]),
    "input": (["--input", "none"], ["--input: none", "is not a folder"]),
    "json": (["--json", "none/rows.jsonl"], ["--json: none/rows.jsonl", "does not exist"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_option_is_reported_in_one_line(name, capfd):
    arguments, facts = MISTAKES[name]
    assert main(arguments) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("tests.rivals.data_prep: ")
    assert [part for part in facts if part not in line] == []
