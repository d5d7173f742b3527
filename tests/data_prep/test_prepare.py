"""A corpus is what its text and settings say, whatever the formats, units, spills and workers."""

import gc
import gzip
import json
import os
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from tokenizers import Tokenizer

from tandem.data_prep import shuffle, spill, verify
from tandem.data_prep.tokenizers import build
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.token_stream import TokenStream
from tests.data_prep.conftest import run_verb, zstd_frame


def documents(output, split="train"):
    """The documents of a prepared folder as ids, each with its EOS, in stored order."""
    corpus = manifest.load_manifest(output)
    if not getattr(corpus, split).tokens:
        return []
    stream = TokenStream(output, corpus, getattr(corpus, split), source="", seed=None)
    tokens = stream.read_tokens(0, stream.epoch_tokens)
    return np.split(tokens, np.flatnonzero(tokens == corpus.eos_id)[:-1] + 1)


def decoded(output):
    tokenizer = Tokenizer.from_file(str(output / manifest.TOKENIZER_FILE))
    whole = [*documents(output), *documents(output, "validation")]
    return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in whole]


@pytest.fixture
def records(tmp_path, texts):
    """Records of two groups, every third of them a near copy of the one before."""
    long = [text for text in texts if len(text) > 100]
    copies = [text + " more" for text in long]
    every = [text for trio in zip(long, long[1:], copies[1:], strict=False) for text in trio][::2]
    lines = (json.dumps({"text": text, "meta": {"set": f"s{len(text) % 2}"}}) for text in every)
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_every_document_comes_back_once_even_with_the_characters_of_eos_in_it(prepared, folder, texts):
    output = prepared("out", "--input", folder)
    assert sorted(decoded(output)) == sorted(text for text in texts if text)
    corpus = manifest.load_manifest(output)
    assert corpus.counts["documents"] == len(texts) - 1
    assert corpus.counts["empty_documents"] == 1
    assert corpus.train.documents + corpus.validation.documents == len(texts) - 1


def test_bytes_do_not_depend_on_workers_units_spills_or_batches(prepared, folder, content, monkeypatch):
    expected = content(prepared("whole", "--input", folder))
    assert len([name for name in expected if name.startswith("train")]) > 3
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 3_000)
    for workers in (1, 2, 5):
        assert content(prepared(f"{workers} workers", "--input", folder, "--workers", workers)) == expected
    monkeypatch.setattr("tandem.data_prep.encode.MAX_SPILL_BYTES", 2_000)
    monkeypatch.setattr("tandem.data_prep.encode.BATCH_CHARACTERS", 1_000)
    assert content(prepared("spills", "--input", folder)) == expected


def tars(files):
    return {name: data for name, data in files.items() if name.endswith(".tar")}


def test_near_duplicates_and_groups_do_not_depend_on_units_or_spills(prepared, records, content, monkeypatch):
    options = ["--input", records, "--deduplicate", "--group-field", "meta.set"]
    expected = content(prepared("whole", *options))
    assert manifest.load_manifest(records.parent / "whole").counts["duplicate_documents"] > 50
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 3_000)
    shards, facts = tars(expected), manifest.load_manifest(records.parent / "whole")
    assert tars(content(prepared("units", *options))) == shards
    monkeypatch.setattr("tandem.data_prep.encode.BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr("tandem.data_prep.encode.MAX_SPILL_DOCUMENTS", 5)
    assert tars(content(prepared("spills", *options))) == shards
    found = manifest.load_manifest(records.parent / "spills")
    assert (found.counts, found.groups) == (facts.counts, facts.groups)


def test_more_spills_than_files_a_process_may_open(prepared, records, monkeypatch):
    monkeypatch.setattr("tandem.data_prep.encode.BATCH_CHARACTERS", 1)
    monkeypatch.setattr("tandem.data_prep.encode.MAX_SPILL_DOCUMENTS", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        output = prepared("out", "--input", records, "--shard-tokens", 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert manifest.load_manifest(output).counts["documents"] > 60


def test_shards_of_other_inputs_gathered_meanwhile_are_not_taken_for_ours(
    prepared, verified, records, folder, content, monkeypatch
):
    given = ["--tokenizer", prepared("whole", "--input", records) / "tokenizer.json"]
    expected = content(prepared("expected", "--input", records, *given))
    gather = shuffle.gather_shard

    def stopped(output, work, spills, dropped, span, **sizes):
        gather(output, work, spills, dropped, span, **sizes)
        if span.shard_index == 2:
            raise KeyboardInterrupt

    for inputs in (records, folder):
        monkeypatch.setattr("tandem.data_prep.shuffle.gather_shard", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared("out", "--input", inputs, *given)
    monkeypatch.setattr("tandem.data_prep.shuffle.gather_shard", gather)
    output = prepared("out", "--input", records, *given)
    verified(output)
    assert content(output) == expected


def test_a_spill_that_the_disk_has_cut_stops_the_preparation(prepared, records, monkeypatch):
    ranges = shuffle.plan_shard_key_ranges

    def after_the_cut(spills, dropped, shard_tokens):
        os.truncate(spills[0].tokens_path, 100)
        return ranges(spills, dropped, shard_tokens)

    monkeypatch.setattr("tandem.data_prep.shuffle.plan_shard_key_ranges", after_the_cut)
    with pytest.raises(
        UserError, match=r"000.tokens: is shorter than its index states; remove .* and run the same command again$"
    ):
        prepared("out", "--input", records)


def test_a_tokenizer_is_trained_on_a_share_of_a_large_corpus(prepared, folder, monkeypatch):
    whole = prepared("whole", "--input", folder)
    monkeypatch.setattr("tandem.data_prep.stages.TOKENIZER_TRAINING_BYTES", 3_000)
    sampled = [prepared(name, "--input", folder) for name in ("one", "two")]
    assert sampled[0].joinpath("tokenizer.json").read_bytes() == sampled[1].joinpath("tokenizer.json").read_bytes()
    assert sampled[0].joinpath("tokenizer.json").read_bytes() != whole.joinpath("tokenizer.json").read_bytes()


def test_the_seed_changes_the_order_and_not_the_tokenizer(prepared, folder, content):
    one, other = (content(prepared(f"seed {seed}", "--input", folder, "--seed", seed)) for seed in (0, 1))
    assert one["tokenizer.json"] == other["tokenizer.json"]
    assert one["train-000000.tar"] != other["train-000000.tar"]


def test_documents_of_all_files_are_shuffled_together(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 500)
    for name in "ab":
        lines = (json.dumps({"text": f"{name} {number}"}) for number in range(100))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    output = prepared("out", "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--held-out", 0)
    first_letters = [text[0] for text in decoded(output)]
    changes = sum(one != two for one, two in pairwise(first_letters))
    # Of 199 neighbours a random order changes letter at 100 +- 7.
    assert 70 < changes < 130


def test_every_format_gives_the_same_documents(prepared, tmp_path, texts):
    lines = b"\n\n".join(json.dumps({"id": 1, "body": text}).encode() for text in texts) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    half = len(lines) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    frames = zstd_frame(lines[:half]) + zstd_frame(lines[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_bytes(text.encode())
    expected = sorted(text for text in texts if text)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "text"):
        output = prepared(f"out-{name}", "--input", tmp_path / name, "--text-field", "body")
        assert sorted(decoded(output)) == expected, name


def test_only_known_suffixes_or_the_glob_are_read_and_nothing_hidden_nothing_twice(prepared, tmp_path):
    root = tmp_path / "in"
    (root / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.bin", ".hidden.txt", ".git/c.txt"):
        (root / name).write_text(name)
    assert decoded(prepared("out", "--input", root, root / "a.txt", "--held-out", 0)) == ["a.txt"]
    assert decoded(prepared("glob", "--input", root, "--glob", "*.bin", "--held-out", 0)) == ["b.bin"]
    inside = prepared("in/out", "--input", root, "--held-out", 0)
    assert prepared("in/out", "--input", root, "--held-out", 0) == inside, "the output is not its own input"


def test_copies_of_a_text_are_on_one_side_and_the_held_out_share_is_met(prepared, tmp_path):
    texts = [f"text {number}" for number in range(1000)] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    output = prepared("out", "--input", tmp_path / "a.jsonl", "--held-out", 0.1)
    sides = [{ids.tobytes() for ids in documents(output, split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    # 1,000 draws at 0.1: 100 +- 9.5.
    assert 60 < len(sides[1]) < 140


def test_the_trained_tokenizer_has_seen_no_held_out_text(prepared, folder):
    output = prepared("out", "--input", folder, "--held-out", 0.5)
    given = Tokenizer.from_file(str(output / "tokenizer.json"))
    training = [given.decode(ids[:-1], skip_special_tokens=False) for ids in documents(output)]
    assert build.train_bpe(training, 300, "<|endoftext|>") == (output / "tokenizer.json").read_text()


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_in_text_are_text_whatever_the_tokenizer_says_of_them(prepared, tmp_path, special):
    tree = json.loads(build.train_bpe(["some words"] * 9, 270, "<|endoftext|>"))
    tree["added_tokens"][0]["special"] = special
    pad = {"id": len(tree["model"]["vocab"]), "content": "<pad>", "special": True}
    tree["added_tokens"].append(tree["added_tokens"][0] | pad)
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file = tmp_path / "given.json"
    file.write_text(json.dumps(tree))
    (tmp_path / "a.txt").write_text("<|endoftext|> and <pad>, some words" * 3)
    output = prepared("out", "--input", tmp_path / "a.txt", "--tokenizer", file, "--held-out", 0)
    assert decoded(output) == ["<|endoftext|> and <pad>, some words" * 3]
    assert len(documents(output)) == 1
    assert (output / "tokenizer.json").read_bytes() == file.read_bytes()


# webdataset 1.0.2 leaves the last file it read to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_shards(prepared, folder):
    output = prepared("out", "--input", folder)
    corpus = manifest.load_manifest(output)
    files = [str(output / shard.file) for shard in corpus.train.shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    gc.collect()
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    tokens = np.concatenate([np.frombuffer(sample["u16"], "<u2") for sample in samples])
    assert np.array_equal(tokens, np.concatenate(documents(output)))


def test_the_manifest_counts_and_measures_what_is_there(prepared, folder, capsys):
    output = prepared("out", "--input", folder)
    corpus = manifest.load_manifest(output)
    tokens = np.concatenate(documents(output))
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert corpus.unigram_entropy_nats == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-6)
    assert (len(tokens), tokens.max() < corpus.vocab <= 300) == (corpus.train.tokens, True)
    assert f"{corpus.unigram_entropy_nats:.4f} nats" in capsys.readouterr().out


def test_a_vocabulary_beyond_65536_is_stored_in_32_bits(prepared, tmp_path, texts):
    tree = json.loads(build.train_bpe(texts, 300, "<|endoftext|>"))
    vocab = tree["model"]["vocab"]
    vocab |= {f"never {number}": number for number in range(len(vocab), 70_000)}
    eos = tree["added_tokens"][0]
    tree["added_tokens"].append(eos | {"id": 70_000, "content": "token", "special": False})
    file = tmp_path / "given.json"
    file.write_text(json.dumps(tree))
    (tmp_path / "a.txt").write_text("a token b")
    output = prepared("out", "--input", tmp_path / "a.txt", "--tokenizer", file, "--held-out", 0)
    assert (manifest.load_manifest(output).dtype, manifest.load_manifest(output).vocab) == ("uint32", 70_001)
    assert 70_000 in documents(output)[0]
    assert decoded(output) == ["a token b"]


def test_cleaning_is_counted_and_groups_add_up(prepared, tmp_path):
    unlike = [" ".join(f"{number}-{word}" for word in range(60)) for number in range(40)]
    long, decomposed = unlike[0], "e\u0301" * 200
    records = [{"text": text, "meta": {"set": f"s{number % 2}"}} for number, text in enumerate(unlike)]
    records += [{"text": long + " and a little more", "meta": {"set": "s0"}}, {"text": "short", "meta": {"set": "s1"}}]
    records += [{"text": decomposed, "meta": {}}, {"text": "", "meta": {"set": "s1"}}]
    records += [{"text": "Taken FROM a benchmark! " * 20, "meta": {"set": "s1"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "benchmark.txt").write_text("taken from a benchmark " * 20)
    cleaning = ["--nfc", "--min-characters", 100, "--deduplicate", "--decontaminate", tmp_path / "benchmark.txt"]
    output = prepared("out", "--input", tmp_path / "a.jsonl", *cleaning, "--group-field", "meta.set", "--held-out", 0)
    corpus = manifest.load_manifest(output)
    assert corpus.counts | {"tokens": 0} == {
        "files": 1, "empty_documents": 1, "short_documents": 1, "normalized_documents": 1,
        "contaminated_documents": 1, "duplicate_documents": 1, "documents": 41, "tokens": 0,
    }  # fmt: skip
    assert {name: group["documents"] for name, group in corpus.groups.items()} == {"": 1, "s0": 20, "s1": 20}
    assert sum(group["tokens"] for group in corpus.groups.values()) == corpus.train.tokens
    assert sorted(decoded(output)) == sorted([*unlike, "\u00e9" * 200])
    one = prepared("one", "--input", tmp_path / "a.jsonl", "--where", "meta.set=s1", "--held-out", 0)
    assert manifest.load_manifest(one).counts["filtered_documents"] == 22
    assert manifest.load_manifest(one).counts["documents"] == 22


def test_the_name_of_a_file_need_not_be_utf_8(prepared, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"other.txt"):
        (Path(os.fsdecode(bytes(folder) + b"/" + name))).write_text(f"the text of {name!r}")
    output = prepared("out", "--input", folder, "--held-out", 0)
    assert sorted(decoded(output)) == [r"the text of b'caf\xe9.txt'", "the text of b'other.txt'"]
    run_verb(verify, output)


def test_a_field_of_too_many_values_makes_no_groups(prepared, records, monkeypatch):
    monkeypatch.setattr(spill, "MAX_GROUPS", 1)
    with pytest.raises(
        UserError,
        match=r"--group-field: meta.set has more than 1 different values, counted up to document 0/records.jsonl:\d+; name a",
    ):
        prepared("out", "--input", records, "--group-field", "meta.set")


def test_a_group_with_a_nul_character_makes_a_manifest_that_can_be_read(prepared, tmp_path):
    lines = [json.dumps({"text": f"some words {number}", "set": "a\0b"}) for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    output = prepared("out", "--input", tmp_path / "a.jsonl", "--group-field", "set", "--held-out", 0)
    assert manifest.load_manifest(output).groups[r"a\0b"]["documents"] == 3


def test_a_group_field_that_no_document_has_is_said(prepared, folder, capsys):
    prepared("out", "--input", folder, "--group-field", "nope", "--held-out", 0)
    said = capsys.readouterr().out
    assert "  (none): 303 documents" in said
    assert "no document has the field nope of --group-field" in said
    assert "was held out" not in said
