"""A small tokenizer of each form, all of the same tokens."""

import argparse
import base64
import json
from itertools import product
from pathlib import Path

import pytest

from tandem.data_prep.tokenizers import build, tiktoken_file
from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE
from tandem.data_prep.tokenizers.tiktoken_file import END_OF_TEXT, SCHEMES, TiktokenScheme

TEXTS = [
    "def encode(texts, places=None):\n    return [12 + index for index in range(1024)]  # the rows of a shard\n",
    "The cursor of the stream isn't the stream; it's 2,049 tokens a row, and they're counted one by one.\r\n\r\n",
    "Grüße aus Köln, señor! 漢字かな交じり文と漢字 मानक हिन्दी में विश्व हैं и так далее, и так далее 👍👍\n",
    Path(argparse.__file__).read_text(encoding="utf-8")[:40_000],
    "1024" * 100,
]
VOCAB_SIZE = 1_200
CHARACTER_BYTES = {character: value for value, character in BYTE_TO_UNICODE.items()}


def split_probe_tokenizer(pattern: str | None) -> str:
    """A tokenizer that shows where text is split: each byte is merged with a letter, digit, mark or space beside it, so
    that two bytes are one token wherever no split parts them."""
    vocab = {character: value for value, character in BYTE_TO_UNICODE.items()}
    merges = []
    for neighbour, value in product(b" a1!'\n\rsS", range(256)):
        for left, right in ((neighbour, value), (value, neighbour)):
            merged = BYTE_TO_UNICODE[left] + BYTE_TO_UNICODE[right]
            if merged not in vocab:
                vocab[merged] = len(vocab)
                merges.append((BYTE_TO_UNICODE[left], BYTE_TO_UNICODE[right]))
    return json.dumps(
        tiktoken_file.build_tokenizer_tree(vocab | {END_OF_TEXT: 9_999}, merges, pattern, {END_OF_TEXT: 9_999})
    )


@pytest.fixture(scope="session")
def trained() -> str:
    return build.train_bpe(TEXTS, VOCAB_SIZE, END_OF_TEXT)


@pytest.fixture(scope="session")
def tokens(trained) -> list[bytes]:
    """Of the trained tokenizer, EOS left out, in the order in which they were learnt."""
    vocab = json.loads(trained)["model"]["vocab"]
    in_order = sorted(vocab, key=vocab.__getitem__)
    return [bytes(CHARACTER_BYTES[character] for character in token) for token in in_order if token != END_OF_TEXT]


@pytest.fixture(scope="session")
def ranks_file(tokens) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@pytest.fixture(scope="session", params=["gpt2", "arcade100k"])
def scheme(request, tokens) -> TiktokenScheme:
    """A scheme of the small tokenizer that splits text as the real one does."""
    return TiktokenScheme(len(tokens), SCHEMES[request.param].split_pattern, {END_OF_TEXT: len(tokens)})


@pytest.fixture(scope="session")
def tokenizer_json(scheme, tokens) -> str:
    return tiktoken_file.build_tokenizer_json(tokens, scheme, "test")
