"""Two tokenizer.json are one tokenizer if they give the same ids and the same text, whatever wrote the files."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.tokenizer_file import find_difference, parse_tokenizer
from tests.data_prep.corpus_writer import EOS, small_tokenizer, write_corpus


def difference_of(first: bytes, second: bytes, eos_token: str = EOS) -> str | None:
    return find_difference(parse_tokenizer(first, "first"), parse_tokenizer(second, "second"), eos_token)


def changed(path: str, value: object) -> bytes:
    """The small tokenizer with one value changed, by keys and indices with dots between them."""
    tree = json.loads(small_tokenizer().to_str())
    *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    part = tree
    for name in parents:
        part = part[name]
    part[last] = value
    return json.dumps(tree).encode()


def older_form() -> bytes:
    """The small tokenizer as an older writer: merges as text, no defaults, other order, EOS only among the added tokens."""
    tree = json.loads(small_tokenizer().to_str())
    model = {name: value for name, value in tree["model"].items() if value not in (None, False)}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    model["vocab"] = {token: index for token, index in sorted(model["vocab"].items()) if token != EOS}
    tree["pre_tokenizer"].pop("use_regex")
    return json.dumps({**{name: tree[name] for name in sorted(tree)}, "model": model}).encode()


def added_word() -> bytes:
    """The small tokenizer with a word of its vocabulary among the added tokens, which is then matched inside text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tree = json.loads(small_tokenizer().to_str())
    tree["added_tokens"].append({"id": tree["model"]["vocab"]["a"], "content": "a", **flags})
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    "other",
    [
        older_form(),
        small_tokenizer().to_str(pretty=True).encode(),
        changed("truncation", {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}),
        changed("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
        changed("decoder", None),
        changed("added_tokens.0.special", False),
        changed("model.dropout", 0.0),
    ],
    ids=["older form", "indented", "truncation", "post-processor", "decoder", "EOS not special", "dropout 0"],
)
def test_the_same_tokenizer_in_other_bytes(other):
    assert difference_of(small_tokenizer().to_str().encode(), other) is None


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (changed("model.vocab.a", 299), "ids that differ: 2; id 65 is 'a' in the first and no token in the second"),
        (
            changed("added_tokens.0.content", "<eos>"),
            "ids that differ: 1; id 0 is '<|endoftext|>' in the first and '<eos>'",
        ),
        (added_word(), "their added_tokens differs"),
        (changed("model.merges", []), "their model differs"),
        (changed("model.ignore_merges", True), "their model differs"),
        (changed("normalizer", {"type": "NFC"}), "their normalizer differs"),
        (changed("pre_tokenizer.use_regex", False), "their pre_tokenizer differs"),
    ],
)
def test_another_tokenizer(other, difference):
    found = difference_of(small_tokenizer().to_str().encode(), other)
    assert found is not None
    assert difference in found


def test_unigram_and_the_two_names_of_its_prefix():
    def unigram(unk_id, **splits) -> bytes:
        tree = json.loads(Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=unk_id)).to_str())
        return json.dumps(tree | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"} | splits}).encode()

    with_unk = Tokenizer.from_str(unigram(0, prepend_scheme="always", split=True).decode())
    with_unk.pre_tokenizer = pre_tokenizers.Metaspace()
    assert difference_of(with_unk.to_str().encode(), unigram(0, add_prefix_space=True), "b") is None
    assert difference_of(with_unk.to_str().encode(), unigram(0, add_prefix_space=False), "b")
    assert difference_of(unigram(0), unigram(1), "b")
    assert difference_of(unigram(0), unigram(None), "b")
    assert "ends documents" in str(difference_of(unigram(0), unigram(0, split=False), "none"))


def test_a_file_is_compared_with_the_corpus_by_hash_and_then_by_meaning(tmp_path):
    corpus, file = write_corpus(tmp_path / "corpus", ["a text"]), tmp_path / "tokenizer.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        manifest.check_tokenizer(file, corpus, "data.tokenizer", corpus_folder=tmp_path / "corpus")

    check(older_form())
    with pytest.raises(
        UserError, match=rf"sha256 .*sha256 is {corpus.tokenizer_sha256[:12]} \(.* their normalizer differs\);"
    ):
        check(changed("normalizer", {"type": "NFC"}))
    (tmp_path / "corpus" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"corpus/tokenizer.json: has sha256 44136fa355b3, but manifest.json .*restore it"
    ):
        check(older_form())
    (tmp_path / "corpus" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"data.tokenizer: .* has sha256 .*; use the tokenizer.json in the corpus"):
        check(older_form())
