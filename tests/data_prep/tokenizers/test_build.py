import json
from dataclasses import replace

import pytest
import tiktoken
from tokenizers import Tokenizer

from tandem.data_prep.tokenizers import build, distinguishing_texts, encoding, tiktoken_file
from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE
from tandem.data_prep.tokenizers.tiktoken_file import END_OF_TEXT, SCHEMES
from tandem.trainer.config import UserError
from tests.data_prep.tokenizers.conftest import TEXTS

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""As tiktoken has it."""


def ids(tokenizer_json, texts):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return [encoded.ids for encoded in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def test_ranks_give_back_the_merges_they_were_learnt_by(trained, tokens):
    learnt = [tuple(pair) for pair in json.loads(trained)["model"]["merges"]]
    assert tiktoken_file.find_merges(tokens, "test") == learnt


@pytest.mark.parametrize("kind", build.TIKTOKEN_KINDS)
def test_ranks_encode_every_trap_as_tiktoken_does(kind, tokens):
    scheme = replace(SCHEMES[kind], num_tokens=len(tokens))
    rival = tiktoken.Encoding(
        kind,
        pat_str=scheme.split_pattern or GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens=dict(scheme.special_tokens),
    )
    texts = [*TEXTS, *(text.replace(END_OF_TEXT, "") for text in distinguishing_texts.fixed_texts())]
    assert ids(tiktoken_file.build_tokenizer_json(tokens, scheme, "test"), texts) == rival.encode_ordinary_batch(
        texts, num_threads=1
    )


def test_arcade100k_has_its_special_ids_and_splits_digits_one_by_one(tokens):
    # Its ids from 100,257 on do not depend on how many tokens come before them.
    few = replace(SCHEMES["arcade100k"], num_tokens=len(tokens))
    text = tiktoken_file.build_tokenizer_json(tokens, few, "test")
    encoder = encoding.select_encoder(text, END_OF_TEXT, "test", library="gigatoken")
    assert (encoder.vocab_size, encoder.eos_id) == (100_289, 100_257)
    special = {token.content: index for index, token in Tokenizer.from_str(text).get_added_tokens_decoder().items()}
    assert len(special) == 32
    assert 100_256 not in Tokenizer.from_str(text).get_vocab().values()
    known = "<|fim_prefix|> 100258 <|fim_pad|> 100261 <gh_stars> 100262 <jupyter_start> 100267 <reponame> 100275 "
    known += (
        "<|endofprompt|> 100276 <|im_end|> 100278 <|pause|> 100279 <|reg0|> 100280 <|reg7|> 100287 <|extra0|> 100288"
    )
    names = known.split()
    assert {name: special[name] for name in names[::2]} == dict(zip(names[::2], map(int, names[1::2]), strict=True))
    digits, _ = encoder.load()(["1024"])
    assert digits.tolist() == [*(tokens.index(b"%d" % digit) for digit in (1, 0, 2, 4)), 100_257]
    assert any(pair in tokens for pair in (b"10", b"02", b"24"))


@pytest.mark.parametrize("names", build.VOCAB_AND_MERGES_FILES)
def test_vocabulary_files_give_the_ids_of_the_tokenizer_they_are_of(names, trained, tmp_path):
    model = json.loads(trained)["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (tmp_path / names[1]).write_text("\n".join(lines), encoding="utf-8")
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        text = build.read_tokenizer(str(path))
        assert ids(text, TEXTS) == ids(trained, TEXTS)
        assert (
            encoding.select_encoder(text, END_OF_TEXT, "test", library="tokenizers").eos_id
            == model["vocab"][END_OF_TEXT]
        )


def test_a_tokenizer_json_is_taken_as_it_is_from_a_file_or_its_folder(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained, encoding="utf-8")
    assert build.read_tokenizer(str(tmp_path)) == build.read_tokenizer(str(tmp_path / "tokenizer.json")) == trained


def built(path):
    """What `build.read_tokenizer` does, but that merges are looked at before the number of tokens."""
    tiktoken_file.find_merges(tiktoken_file.parse_ranks_file(path.read_bytes(), str(path)), str(path))
    build.read_tokenizer(str(path))


def changed(data, number, line):
    lines = data.splitlines()
    lines[number - 1 : number] = [line] if line is not None else []
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (3, b"no base64! 2", "line 3 is 'no base64! 2'"),
        (300, b"QUJD", "line 300 is 'QUJD'"),
        (300, b"QUJD x", "line 300 is 'QUJD x'"),
        (301, b"QUJDREVG 299", "line 301 repeats rank 299"),
        (301, b"IQ== 300", "line 301 repeats the token of rank 0"),
        (40, None, "none of rank 39"),
        (40, b"QUJDREVG 39", "no token for byte 72"),
        (400, b"//79/Pv6 399", "rank 399 is not made of two"),
        (300, b"", "none of rank 299"),
        (10_000, b"", "tokens, but this kind has 50,256"),
    ],
)
def test_a_malformed_ranks_file_is_one_line_that_says_where(number, line, message, ranks_file, tmp_path):
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(changed(ranks_file, number, line))
    with pytest.raises(UserError, match=r"gpt2\.tiktoken: ") as error:
        built(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [("a", "line 2 is 'a'"), ("漢 字", "line 2 is '漢 字'"), ("a a a", "line 2 is 'a a a'"), (None, "line 3 is")],
)
def test_a_malformed_merge_is_one_line_that_says_where(line, message, trained, tmp_path):
    model = json.loads(trained)["model"]
    first = " ".join(model["merges"][0])
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", line or first, first]), encoding="utf-8")
    with pytest.raises(UserError, match=r"merges.txt: line \d") as error:
        build.read_tokenizer(str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["[1]", '{"a": 1, "b": 1}', '{"a": "1"}', '{"a": 1}', "{"])
def test_a_malformed_vocabulary_names_its_file(content, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match=r"vocab.json: (is not a vocabulary|has no token for byte)"):
        build.read_tokenizer(str(tmp_path))


def test_an_unknown_kind_is_asked_for(ranks_file, tmp_path):
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(ranks_file)
    with pytest.raises(UserError, match=r"--tokenizer-kind gpt2\|arcade100k"):
        build.read_tokenizer(str(path))
    with pytest.raises(UserError, match="but this kind has 100,256"):
        build.read_tokenizer(str(path), "arcade100k")
    with pytest.raises(UserError, match="--tokenizer-kind: llama is not known; use one of"):
        build.read_tokenizer(str(path), "llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains none of tokenizer\.json"):
        build.read_tokenizer(str(tmp_path / "empty"))


def test_bytes_are_written_as_the_library_writes_them():
    spelled = Tokenizer.from_str(
        json.dumps(tiktoken_file.build_tokenizer_tree({c: v for v, c in BYTE_TO_UNICODE.items()}, [], None, {}))
    )
    text = "".join(chr(code) for code in (0x7F, 0x80, 0x7FF, 0xFFF, 0x1F600)) + "\0\n !~\xad"
    assert spelled.encode(text).ids == list(text.encode())
