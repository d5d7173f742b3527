"""A tokenizer that loses text, or gives other ids each time, is refused or told with figures."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tandem.data_prep import prepare
from tandem.data_prep.tokenizers.encoding import select_encoder
from tandem.trainer.config import UserError
from tests.data_prep.conftest import run_verb
from tests.data_prep.corpus_writer import EOS, small_tokenizer


def words(folder, unk_token="<unk>"):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, EOS: 3}, unk_token=unk_token))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    return folder / "words.json"


def prepared(folder, text):
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text(text)
    options = ("--tokenizer", words(folder), "--held-out", 0, "--workers", 1, "--sample-tokens", 512)
    run_verb(prepare, "--input", folder / "in", "--output", folder / "out", *options)


def test_unknown_text_is_counted(tmp_path, capsys):
    prepared(tmp_path, "a b a b q")
    assert "text that the tokenizer does not know: 1 (16.67%); that text is lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["unknown_tokens"] == 1


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
