"""`tandem inspect` shows what was written and where it is, and reports in one line what does not exist."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem.data_prep import inspect
from tandem.data_prep.records import BAD_RECORD_COUNTS
from tandem.data_prep.settings import DROPPED_COUNT_NAMES
from tandem.data_prep.vocabulary import Vocabulary, make_visible
from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import load_manifest
from tests.data_prep import corpus_writer
from tests.data_prep.conftest import run_verb

STRANGE = "naïve 漢字 🙂\r\n\ttab <|endoftext|> \x1b[31m\u200b nb\xa0sp"
WORDS = ["the", "row", "of", "a", "shard", "tokens"]
TRAIN = ["short", "", STRANGE, *(" ".join(WORDS[n * k % 6] for n in range(k)) for k in range(1, 200, 7))]
HELD_OUT = ["held out text", "another row"]


@pytest.fixture
def folder(tmp_path):
    """A corpus of these documents in several shards."""
    made = corpus_writer.write_corpus(tmp_path / "corpus", TRAIN, HELD_OUT)
    assert len(made.train.shards) > 2
    return tmp_path / "corpus"


@pytest.fixture
def shown(capsys):
    """shown(folder, "--row", 3): what is printed; an object with --json."""

    def call(*arguments):
        run_verb(inspect, *arguments)
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return call


@pytest.mark.parametrize("arguments", [("--row", 0), ("--document", 1), ("--find", "row"), ()], ids=str)
def test_a_corpus_that_was_written_wrongly_is_refused(folder, arguments):
    corpus = load_manifest(folder)
    corpus_writer.rewrite_manifest(folder, corpus, vocab=150)
    with pytest.raises(UserError, match=r"train-000000.tar: contains id \d+, but manifest.json states vocab 150"):
        run_verb(inspect, folder, *arguments)
    first, *others = corpus.train.shards
    shards = [replace(first, documents=first.documents + 1), *others]
    train = replace(corpus.train, documents=corpus.train.documents + 1, shards=shards)
    corpus_writer.rewrite_manifest(folder, corpus, train=train)
    with pytest.raises(
        UserError, match=r"train-000000.tar: contains \d+ ends of documents .* states \d+ and a whole one"
    ):
        run_verb(inspect, folder, *arguments)


def stream(texts):
    return np.concatenate([corpus_writer.encode_document(text) for text in texts])


@pytest.mark.parametrize(("split", "texts"), [("train", TRAIN), ("validation", HELD_OUT)])
def test_rows_cover_the_stored_order_and_name_the_part_of_each_document(folder, shown, split, texts):
    tokens, lengths = stream(texts), [len(corpus_writer.encode_document(text)) for text in texts]
    begins = np.cumsum([0, *lengths])
    rows = -(-len(tokens) // 100)
    for number in range(rows):
        row = shown(folder, "--row", number, "--seq-len", 100, "--split", split, "--json")
        found = [token for document in row["documents"] for token in document["tokens"]]
        assert found == tokens[100 * number : 100 * number + 100].tolist()
        place = 100 * number
        for document in row["documents"]:
            index, count = document["document"], len(document["tokens"])
            assert (document["before"], document["length"]) == (place - begins[index], lengths[index])
            assert document["before"] + count + document["after"] == lengths[index]
            place += count
    with pytest.raises(
        UserError, match=rf"--row: {rows} does not exist; {split} has {rows} rows of 100 tokens; use 0 to"
    ):
        run_verb(inspect, folder, "--row", rows, "--seq-len", 100, "--split", split)


def test_a_range_of_a_shard_is_the_same_tokens_as_in_its_row(folder, shown):
    beyond = inspect.CorpusReader(str(folder)).manifest.train.shards[0].tokens + 50
    row = shown(folder, "--row", 0, "--seq-len", beyond, "--json")
    assert len({document["shard"] for document in row["documents"]}) == 2, "a row across two shards"
    for document in row["documents"]:
        span = f"{document['first']}:{document['first'] + len(document['tokens'])}"
        again = shown(folder, "--shard", document["shard"], "--tokens", span, "--json")
        assert again["documents"] == [document]
        counted = f"{document['first']}+{len(document['tokens'])}"
        assert shown(folder, "--shard", document["shard"], "--tokens", counted, "--json") == again
    whole = shown(folder, "--shard", "validation-000000.tar", "--json")
    assert [document["text"] for document in whole["documents"]] == [f"{text}{corpus_writer.EOS}" for text in HELD_OUT]


def test_every_document_has_its_number(folder, shown):
    for split, texts in (("train", TRAIN), ("validation", HELD_OUT)):
        for number, text in enumerate(texts):
            (document,) = shown(folder, "--document", number, "--split", split, "--json")["documents"]
            assert document["text"] == f"{text}{corpus_writer.EOS}"
            assert document["document"] == number


def test_borders_and_hidden_characters_can_be_seen_and_nothing_is_coloured(folder, shown):
    text = shown(folder, "--row", 0, "--seq-len", 100)
    lines = text.splitlines()
    assert "100 tokens, 7 documents, whole or in part" in lines[0]
    assert (lines[2], lines[4]) == (f"short⟦{corpus_writer.EOS}⟧", f"⟦{corpus_writer.EOS}⟧")
    strange = len(corpus_writer.encode_document(STRANGE))
    assert lines[5].startswith(f"── 2: train document 2, train-000000.tar 7:{7 + strange}, {strange} tokens ──")
    assert "naïve 漢字 🙂␍↵\n→       tab <|endoftext|> ␛[31m\\u200b nb\\u00a0sp⟦<|endoftext|>⟧\n" in text
    assert "\x1b" not in text
    long = shown(folder, "--document", len(TRAIN) - 1).splitlines()
    assert len(long) > 5
    assert max(map(len, long)) <= 80
    part = shown(folder, "--shard", "train-000000.tar", "--tokens", "9:30")
    assert f"{strange} tokens, starts 2 earlier, continues for {strange - 23}" in part


def test_characters_that_a_border_cuts_are_shown_as_the_bytes_they_are(folder, shown):
    tokens = stream(TRAIN)
    whole = corpus_writer.small_tokenizer().encode("漢").ids
    assert len(whole) == 3, "the character is cut where its tokens are"
    first = next(n for n in range(len(tokens)) if tokens[n : n + 3].tolist() == whole)
    left = shown(folder, "--shard", "train-000000.tar", "--tokens", f"{first - 1}:{first + 2}")
    assert " ⟨e6⟩⟨bc⟩\n" in left
    right = shown(folder, "--shard", "train-000000.tar", "--tokens", f"{first + 2}:{first + 3}")
    assert "\n⟨a2⟩\n" in right
    assert shown(folder, "--shard", "train-000000.tar", "--tokens", f"{first + 2}:{first + 3}", "--json")


def test_text_is_found_in_the_first_documents_that_hold_it(folder, shown):
    holding = [number for number, text in enumerate(TRAIN) if "the shard" in text]
    assert len(holding) > 3
    found = shown(folder, "--find", "the shard", "--limit", 3, "--json")["documents"]
    assert [document["document"] for document in found] == holding[:3]
    everywhere = shown(folder, "--find", "the shard", "--limit", 999, "--json")["documents"]
    assert [document["document"] for document in everywhere] == holding
    assert "漢字 🙂␍↵" in shown(folder, "--find", "字 🙂")
    assert "no document of train contains 'held out'" in shown(folder, "--find", "held out")
    assert "held out text" in shown(folder, "--find", "held out", "--split", "validation")


def test_a_corpus_is_described_by_its_manifest_and_its_tokens(folder, shown):
    corpus = inspect.CorpusReader(str(folder)).manifest
    counts = corpus.counts | {"files": 2, "short_documents": 12, "empty_documents": 0}
    counts |= {"samples": 9, "added_eos_tokens": 3, "padding_tokens": 1234, "other_members": 2}
    half = {"documents": 8, "tokens": corpus.counts["tokens"] // 2}
    corpus_writer.rewrite_manifest(folder, corpus, counts=counts, groups={"Wiki": half, "": half})
    known = shown(folder, "--sample", "all", "--json")
    lengths = [len(corpus_writer.encode_document(text)) for text in (*TRAIN, *HELD_OUT)]
    assert (known["documents"], known["tokens"]) == (len(lengths), sum(lengths))
    assert known["left_out"] == {"other_members": 2, "short_documents": 12}
    assert known["padding_tokens"] == 1234
    assert "1,234 ids removed from the ends of samples" in shown(folder)
    assert known["groups"]["Wiki"] == half | {"share": half["tokens"] / sum(lengths), "mean_length": half["tokens"] / 8}
    files = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert known["overhead"] == files / (2 * sum(lengths)) - 1
    text_bytes = sum(len(text.encode()) for text in (*TRAIN, *HELD_OUT))
    assert known["text_bytes_per_token"] == text_bytes / sum(lengths)
    quartiles = np.quantile(lengths, [0.25, 0.5, 0.75], method="lower").tolist()
    assert [known["lengths"][name] for name in ("quarter", "median", "three_quarters")] == quartiles
    assert known["lengths"]["longest"] == max(lengths)
    bins = known["lengths"]["bins"]
    for one in bins:
        inside = [length for length in lengths if one["from"] <= length <= one["to"]]
        assert (one["documents"], one["tokens"]) == (len(inside), sum(inside))
    assert sum(one["documents"] for one in bins) == len(lengths)
    text = shown(folder)
    for part in ("12 short documents", "uint16", "50.00%", f"longest {max(lengths)}", "█", "num input files 2"):
        assert part in text, part
    assert re.search(rf"validation +2 documents, {len(stream(HELD_OUT))} tokens, 1 shards", text)


def test_every_count_that_a_preparation_makes_is_of_what_was_left_out_or_known_not_to_be():
    sources = "".join(path.read_text() for path in Path(inspect.__file__).parent.rglob("*.py"))
    made = set(re.findall(r"""counts\[["'](\w+)["']\] \+?= """, sources))
    not_left_out = {
        "files",
        "normalized_documents",
        "samples",
        "added_eos_tokens",
        "padding_tokens",
        "unknown_tokens",
        "documents_without_tokens",
    }
    made |= {*BAD_RECORD_COUNTS}  # which BadRecords counts
    assert made == {*DROPPED_COUNT_NAMES, *not_left_out}


def test_lengths_may_be_counted_in_some_shards_from_everywhere(folder, shown):
    shards = inspect.CorpusReader(str(folder)).manifest.shards
    known = shown(folder, "--sample", 2, "--json")
    assert known["scanned_shards"] == 2
    taken = [shards[0], shards[len(shards) // 2]]
    assert known["lengths"]["documents"] == sum(shard.documents for shard in taken)
    assert known["lengths"]["tokens"] == sum(shard.tokens for shard in taken)


def test_a_corpus_elsewhere_looks_the_same(folder, shown, address, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where copies of shards are kept
    for arguments in (["--row", 3, "--seq-len", 100], ["--sample", "all"]):
        here, there = (shown(where, *arguments, "--json") for where in (folder, f"{address}/corpus"))
        assert there | {"corpus": here["corpus"]} == here
    with pytest.raises(UserError, match=r"nowhere/manifest.json: no such file"):
        run_verb(inspect, f"{address}/nowhere")


def test_every_mistake_is_one_line(folder, tmp_path):
    mistakes = {
        "corpus/manifest.json: no such file": [tmp_path / "no" / "corpus"],
        r"--shard: x.tar is not one of the \d+ shards of .*corpus; name one of train-000000.tar to validation-000000.tar": [
            folder,
            "--shard",
            "x.tar",
        ],
        "--tokens: 5:3 is not a range .*; write FIRST:END": [folder, "--shard", "train-000000.tar", "--tokens", "5:3"],
        "--tokens: 0:99999 is not a range": [folder, "--shard", "train-000000.tar", "--tokens", "0:99999"],
        "--tokens: 3 is not a range": [folder, "--shard", "train-000000.tar", "--tokens", "3"],
        "--tokens: 0:3 is a range of a shard": [folder, "--tokens", "0:3"],
        "--document: 2 does not exist; validation has 2 documents": [folder, "--document", 2, "--split", "validation"],
        "--row: -1 does not exist; train has 2 rows": [folder, "--row", -1],
        "--seq-len: 0 is too small; use 1 or more": [folder, "--row", 0, "--seq-len", 0],
        "--sample: none is not a number of shards": [folder, "--sample", "none"],
        "--find: the text is empty": [folder, "--find", ""],
    }
    for message, arguments in mistakes.items():
        with pytest.raises(UserError, match=message) as caught:
            run_verb(inspect, *arguments)
        assert "\n" not in str(caught.value)
    (folder / "train-000000.tar").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"train-000000.tar: has 4 bytes"):
        run_verb(inspect, folder, "--row", 0)


def test_a_split_without_documents_is_no_row_to_show(tmp_path):
    corpus_writer.write_corpus(tmp_path / "corpus", TRAIN[:3])
    with pytest.raises(
        UserError, match="--row: 0 does not exist; validation has 0 rows of 2,048 tokens; use the other --split"
    ):
        run_verb(inspect, tmp_path / "corpus", "--row", 0, "--split", "validation")


def test_bytes_of_every_token_are_those_that_the_tokenizer_decodes():
    vocabulary = Vocabulary(corpus_writer.small_tokenizer().to_str(), corpus_writer.EOS, "here")
    for text in (STRANGE, "the row of a shard", "".join(map(chr, range(32, 0x3000)))):
        ids = corpus_writer.encode_document(text)[:-1]
        assert (
            vocabulary.decode(ids)
            == text
            == corpus_writer.small_tokenizer().decode(ids.tolist(), skip_special_tokens=False)
        )
        assert vocabulary.token_sizes_bytes[ids].sum() == len(text.encode())
        assert vocabulary.render(ids).plain == make_visible(text)


def test_a_tokenizer_that_is_not_byte_level_decodes_with_its_own_decoder():
    vocab = {"some": 0, "words": 1, corpus_writer.EOS: 2}
    made = Tokenizer(models.WordLevel(vocab, unk_token="some"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    made.add_special_tokens([corpus_writer.EOS])
    vocabulary = Vocabulary(made.to_str(), corpus_writer.EOS, "here")
    assert vocabulary.token_sizes_bytes is None
    assert vocabulary.decode(np.array([0, 1, 2])) == f"some words {corpus_writer.EOS}"
    assert vocabulary.render(np.array([0, 1, 2])).plain == f"some words⟦{corpus_writer.EOS}⟧"
