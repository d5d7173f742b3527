"""A tokenizer that loses text, or gives other ids each time, is refused or told with figures."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tandem.data_prep import prepare
from tandem.data_prep.tokenizers.encoding import select_encoder
from tandem.trainer.config import UserError
from tests.data_prep.conftest import run_verb
from tests.data_prep.corpus_writer import EOS, small_tokenizer
from tests.data_prep.test_webdataset import write_shards


def words(folder, unk_token="<unk>"):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, EOS: 3}, unk_token=unk_token))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    return folder / "words.json"


def letters(folder):
    """A tokenizer that gives no token for what it does not know."""
    Tokenizer(models.BPE({"a": 0, "b": 1, EOS: 2}, [])).save(str(folder / "letters.json"))
    return folder / "letters.json"


def prepared(folder, *texts, make=words):
    (folder / "in").mkdir()
    for number, text in enumerate(texts):
        (folder / "in" / f"{number}.txt").write_text(text)
    options = ("--tokenizer", make(folder), "--held-out", 0, "--workers", 1, "--sample-tokens", 512)
    run_verb(prepare, "--input", folder / "in", "--output", folder / "out", *options)


def test_unknown_text_is_counted(tmp_path, capsys):
    prepared(tmp_path, "a b a b q")
    assert "text that the tokenizer does not know: 1 (16.67%); that text is lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["unknown_tokens"] == 1


def eos_for_unknown(folder):
    """A tokenizer of all bytes, as GPT-2's, that names EOS as its token for unknown text."""
    tree = json.loads(small_tokenizer().to_str())
    tree["model"]["unk_token"] = EOS
    (folder / "bytes.json").write_text(json.dumps(tree))
    return folder / "bytes.json"


def adopted(folder, samples):
    """Adopt these lists of ids of `words`, and return their number of unknown tokens."""
    write_shards(folder / "tok", [{"json": json.dumps(ids)} for ids in samples])
    options = ("--tokens", "json", "--held-out", 0, "--workers", 1, "--sample-tokens", 512)
    run_verb(prepare, "--input", folder / "tok", "--output", folder / "out", "--tokenizer", words(folder), *options)
    return json.loads((folder / "out" / "manifest.json").read_text())["counts"].get("unknown_tokens")


def test_unknown_tokens_of_an_adopted_corpus_are_counted(tmp_path, capsys):
    assert adopted(tmp_path, [[1, 0, 2, 3], [1, 2, 1, 3]]) == 1
    assert "text that the tokenizer does not know: 1 (12.50%); that text is lost" in capsys.readouterr().out


def test_an_adopted_corpus_of_unknown_tokens_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^--tokenizer: 3 of 4 tokens .*, more than 50%; name the tokenizer that made these"
    ):
        adopted(tmp_path, [[0, 0, 0, 3]])
    assert not (tmp_path / "out").exists()


def test_the_eos_of_a_document_is_not_an_unknown_token(tmp_path):
    prepared(tmp_path, "a", "b", make=eos_for_unknown)
    assert "unknown_tokens" not in json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]


def test_a_corpus_of_unknown_text_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"--tokenizer: 4 of 6 tokens are its token for unknown text, id 0, more than 50%"
    ):
        prepared(tmp_path, "a x y z w")
    assert not (tmp_path / "out").exists()


def test_random_ids_are_refused():
    tree = json.loads(small_tokenizer().to_str())
    tree["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"^t.json: model.dropout is 0.1, so the ids of a text are random"):
        select_encoder(json.dumps(tree), EOS, "t.json")


def test_text_without_tokens_is_counted_and_refused_if_it_is_most_of_the_corpus(tmp_path, capsys):
    prepared(tmp_path, "ab", "b", "xyz", " ", make=letters)
    said = capsys.readouterr().out
    assert "--tokenizer: gives no token for characters that it does not know, so they are lost" in said
    assert "documents for whose text the tokenizer gives no token: 1;" in said
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"^--tokenizer: gives no token for the text of 2 of 3 documents; name"):
        prepared(tmp_path / "b", "ab", "xyz", "q", make=letters)
    assert not (tmp_path / "b" / "out").exists()
    capsys.readouterr()
    (tmp_path / "c").mkdir()
    prepared(tmp_path / "c", "a b")
    assert "gives no token" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "model", [models.WordLevel({EOS: 0, "a": 1}, "none"), models.Unigram([(EOS, 0.0), ("a", -1.0)])]
)
def test_a_tokenizer_that_fails_on_unknown_text_is_one_line(model):
    with pytest.raises(UserError, match=r"^--tokenizer: cannot encode every text \(.*\); name one that knows all text"):
        select_encoder(Tokenizer(model).to_str(), EOS, "t.json")
