import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest

from tandem.data_prep.tokenizers import distinguishing_texts, encoding, gigatoken_encoder
from tandem.data_prep.tokenizers.encoding import EncoderSpec, ReferenceEncoder
from tandem.data_prep.tokenizers.gigatoken_encoder import GigatokenEncoder
from tandem.data_prep.tokenizers.tiktoken_file import END_OF_TEXT, SCHEMES
from tandem.trainer.config import UserError
from tests import ranks
from tests.data_prep.tokenizers.conftest import TEXTS, split_probe_tokenizer

NEW_LETTERS = "a\u088fa a\U00010940b 1\U000323b0a"
"""Of Unicode 16 and 17."""


@pytest.fixture(scope="session")
def encoder(tokenizer_json) -> EncoderSpec:
    made = encoding.select_encoder(tokenizer_json, END_OF_TEXT, "test", library="tokenizers")
    return replace(made, library="gigatoken")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Traps, text with single bytes changed, characters at random, and letters that only one library knows."""
    draw = random.Random(0)
    made = [*TEXTS, *distinguishing_texts.fixed_texts()]
    for _ in range(300):
        data = bytearray(draw.choice(TEXTS).encode()[:2000])
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
        made.append(data.decode(errors="replace"))
        codes = (draw.choice((0x20, draw.randrange(0x3000), draw.randrange(0xE000, 0x34000))) for _ in range(200))
        made.append("".join(map(chr, codes)))
    made[10:10] = [NEW_LETTERS, "", NEW_LETTERS * 3]
    return [*made, NEW_LETTERS]


def of(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_gigatoken_makes_the_tokens_of_the_reference_of_every_document(encoder, documents):
    tokens, lengths = encoder.load()(documents)
    others, counts = replace(encoder, library="tokenizers").load()(documents)
    assert lengths.tolist() == counts.tolist()
    assert tokens.dtype == others.dtype == np.uint16
    assert of(tokens, lengths) == of(others, counts)


def test_no_document_is_split_elsewhere_than_by_the_reference(scheme, documents):
    encoder = EncoderSpec(split_probe_tokenizer(scheme.split_pattern), END_OF_TEXT, 9_999, 10_000, "gigatoken")
    tokens, lengths = encoder.load()(documents)
    others, counts = replace(encoder, library="tokenizers").load()(documents)
    assert of(tokens, lengths) == of(others, counts)
    # That needs the reference for some of them: without it the libraries differ.
    flat, _ = GigatokenEncoder(encoder.tokenizer_json, ReferenceEncoder(encoder.tokenizer_json))._encode(
        [NEW_LETTERS.encode()]
    )
    assert flat.tolist() != of(tokens, lengths)[10][:-1]


def test_each_document_ends_with_its_only_eos_even_where_its_text_spells_it(encoder, tokens):
    texts = ["", f"a{END_OF_TEXT}", END_OF_TEXT * 2, "b"]
    made, lengths = encoder.load()(texts)
    documents = of(made, lengths)
    assert [document.index(encoder.eos_id) for document in documents] == [len(part) - 1 for part in documents]
    assert [b"".join(tokens[index] for index in part[:-1]).decode() for part in documents] == texts
    assert [len(part) for part in encoder.load()([])] == [0, 0]


@pytest.mark.parametrize("library", ["gigatoken", "tokenizers"])
def test_a_text_that_yields_the_eos_id_is_named_by_its_place(library, encoder, tokens):
    encode = replace(encoder, eos_token="e", eos_id=tokens.index(b"Q"), library=library).load()
    with pytest.raises(UserError, match=r"^third: its text yields the EOS id"):
        encode(["a", "", "aQ", "Q"], ["first", "second", "third", "fourth"])
    with pytest.raises(UserError, match=r"^document 0: "):
        encode(["Q"])


def test_ids_beyond_16_bits_are_kept(tokenizer_json):
    tree = json.loads(tokenizer_json)
    tree["model"]["vocab"][END_OF_TEXT] = tree["added_tokens"][0]["id"] = 70_000
    made, lengths = encoding.select_encoder(json.dumps(tree), END_OF_TEXT, "test", library="tokenizers").load()(
        ["", "a"]
    )
    assert (made.dtype, made.tolist()[0], made.tolist()[-1], lengths.tolist()) == (np.uint32, 70_000, 70_000, [1, 2])


def test_an_encoder_means_the_same_in_another_process(encoder):
    again = pickle.loads(pickle.dumps(encoder))
    assert of(*again.load()(TEXTS)) == of(*encoder.load()(TEXTS))


def changed(tokenizer_json: str, path: str, value) -> str:
    tree = json.loads(tokenizer_json)
    *parents, last = path.split(".")
    place = tree
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(tree)


DIGITS = {"type": "Digits", "individual_digits": True}
WHOLE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
NON_SPECIAL = {"id": 1200, "content": "rows", "special": False} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)
OBSTACLES = [
    ("normalizer", {"type": "Lowercase"}, "it normalizes text"),
    ("pre_tokenizer", WHOLE, "its pre-tokenizer is not one of those compared"),
    (
        "pre_tokenizer",
        {"type": "Sequence", "pretokenizers": [DIGITS, WHOLE | {"use_regex": True}]},
        "its pre-tokenizer is not one of those compared",
    ),
    ("pre_tokenizer.add_prefix_space", True, "its pre-tokenizer is not one of those compared"),
    ("model.merges.700", ["Ġ", "Ġ"], "it lists a merge twice"),
    ("model.vocab.漢", 5_000, "its vocabulary is not that of a byte-level BPE"),
    ("added_tokens.1", NON_SPECIAL, "its added token 'rows' is not special"),
]


@pytest.mark.parametrize(("path", "value", "reason"), OBSTACLES)
def test_what_gigatoken_ignores_is_left_to_the_reference_and_a_line_gives_the_reason(
    path, value, reason, trained, capsys
):
    tree = json.loads(trained)
    tree["added_tokens"].append(NON_SPECIAL | {"content": "<unused>", "special": True})
    text = changed(json.dumps(tree), path, value)
    assert encoding.select_encoder(text, END_OF_TEXT, "mine.json").library == "tokenizers"
    line = capsys.readouterr().out
    assert line.startswith("--tokenizer-library: using tokenizers")
    assert reason in line
    assert line.count("\n") == 1
    with pytest.raises(UserError, match=r"--tokenizer-library: gigatoken cannot encode with mine.json") as error:
        encoding.select_encoder(text, END_OF_TEXT, "mine.json", library="gigatoken")
    assert reason in str(error.value)


def test_the_check_on_a_sample_finds_what_gigatoken_encodes_otherwise(trained):
    split = json.loads(split_probe_tokenizer(SCHEMES["arcade100k"].split_pattern))["pre_tokenizer"]
    digits_first = {"type": "Sequence", "pretokenizers": [DIGITS, *split["pretokenizers"]]}
    for pre_tokenizer, differs in ((split, False), (digits_first, True), (WHOLE, True)):
        text = changed(trained, "pre_tokenizer", pre_tokenizer)
        made = EncoderSpec(text, END_OF_TEXT, 0, 1_200, "tokenizers")
        found = encoding._find_difference(made, TEXTS)
        assert (found is not None and "gigatoken gives other tokens for" in found) == differs


def test_a_tokenizer_that_fits_is_taken_without_a_word(trained, capsys):
    assert encoding.select_encoder(trained, END_OF_TEXT, "test", sample_texts=TEXTS).library == "gigatoken"
    assert encoding.select_encoder(trained, END_OF_TEXT, "test", library="tokenizers").library == "tokenizers"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ('{"added_tokens": []}', "is not a tokenizer"),
    ],
)
def test_an_invalid_tokenizer_is_one_line(text, message, trained):
    with pytest.raises(UserError, match=f"^mine.json: {message}") as error:
        encoding.select_encoder(text, END_OF_TEXT, "mine.json")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^mine.json: has no token '</s>'"):
        encoding.select_encoder(trained, "</s>", "mine.json")
    with pytest.raises(UserError, match="--tokenizer-library: fastest is not known; use one of auto"):
        encoding.select_encoder(trained, END_OF_TEXT, "mine.json", library="fastest")


def test_a_word_as_eos_is_refused_since_texts_hold_it(trained):
    word = next(token for token in json.loads(trained)["model"]["vocab"] if token.isalpha() and len(token) > 3)
    with pytest.raises(UserError, match="its text yields the EOS id"):
        encoding.select_encoder(trained, word, "mine.json")


def words(count: int, seed: int) -> list[str]:
    """Documents of words that no other document has."""
    letters = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, (count, 500, 8), dtype=np.uint8)
    letters[:, :, 0] = ord(" ")
    return [document.tobytes().decode() for document in letters]


def grown(tokenizer_json: str, limit: int) -> tuple[int, list[list[int]]]:
    """MiB that this process grows by once its caches have filled up a first time, and the last tokens."""
    gigatoken_encoder.MAX_CACHE_BYTES = limit
    encode, memory = EncoderSpec(tokenizer_json, END_OF_TEXT, 0, 1_200, "gigatoken").load(), []
    for batch in [words(400, seed) for seed in range(10)]:
        tokens, lengths = encode(batch)
        memory.append(gigatoken_encoder._resident_bytes())
    return memory[-1] - memory[2] >> 20, of(tokens, lengths)


def test_memory_for_words_seen_is_bounded_and_its_loss_does_not_show(trained, tmp_path):
    # Each in a process of its own: what one that has done other things allocates may come from what those have freed.
    [(bounded, tokens)] = ranks.run(grown, 1, tmp_path, trained, 8 << 20)
    [(unbounded, others)] = ranks.run(grown, 1, tmp_path, trained, 1 << 40)
    assert bounded < 40 < unbounded, (bounded, unbounded)
    assert tokens == others


def test_traps_are_few():
    # All of them are encoded by the slow library whenever a corpus is prepared.
    assert sum(len(text.encode()) for text in distinguishing_texts.fixed_texts()) < 600_000
    assert (
        sum(map(len, distinguishing_texts.sample_excerpts(["a" * 10**6] * 1000)))
        == distinguishing_texts.MAX_SAMPLE_CHARACTERS
    )


def test_a_text_for_which_tokenizers_lacks_memory_is_one_line(encoder, monkeypatch, tmp_path):
    encode, limit = replace(encoder, library="tokenizers").load(), tmp_path / "memory.max"
    monkeypatch.setattr(encoding, "LONG_TEXT_CHARACTERS", 10)
    monkeypatch.setattr(encoding, "CGROUP_MEMORY_LIMITS", (tmp_path / "none", limit))
    texts, names = ["short", "a text of 23 characters"], ["0/a", "0/b"]
    for content in ("max\n", "4000\n"):
        limit.write_text(content)
        assert encode(texts, names)[1].size == 2
    limit.write_text("3000\n")
    with pytest.raises(
        UserError, match=r"^0/b: tokenizers needs about 0 GiB of memory for its 23 characters, but 0 GiB"
    ):
        encode(texts, names)
    assert encode(texts[:1])[1].size == 1
    limit.unlink()
    monkeypatch.setattr(encoding, "TOKENIZERS_BYTES_PER_CHARACTER", 1 << 50)
    with pytest.raises(
        UserError, match=r"^a document: tokenizers needs about 24,117,248 GiB .* but \d+ GiB are free; split it"
    ):
        encode(texts)
