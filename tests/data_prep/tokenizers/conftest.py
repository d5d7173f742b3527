"""A small tokenizer of each form, all of the same tokens."""

import argparse
import base64
import json
from itertools import product
from pathlib import Path

import pytest

from tandem.data_prep.tokenizers import build, tiktoken_file
from tandem.data_prep.tokenizers.byte_level import CHARACTERS
from tandem.data_prep.tokenizers.tiktoken_file import END, SCHEMES, Scheme

TEXTS = [
    "def encode(texts, places=None):\n    return [12 + index for index in range(1024)]  # the rows of a shard\n",
    "The cursor of the stream isn't the stream; it's 2,049 tokens a row, and they're counted one by one.\r\n\r\n",
    "Grüße aus Köln, señor! 漢字かな交じり文と漢字 मानक हिन्दी में विश्व हैं и так далее, и так далее 👍👍\n",
    Path(argparse.__file__).read_text(encoding="utf-8")[:40_000],
    "1024" * 100,
]
VOCAB = 1_200
BYTES = {character: value for value, character in CHARACTERS.items()}


def telling(pattern: str | None) -> str:
    """A tokenizer that shows where text is split: each byte is merged with a letter, digit, mark or space beside it, so
    that two bytes are one token wherever no split parts them."""
    vocab = {character: value for value, character in CHARACTERS.items()}
    merges = []
    for neighbour, value in product(b" a1!'\n\rsS", range(256)):
        for left, right in ((neighbour, value), (value, neighbour)):
            merged = CHARACTERS[left] + CHARACTERS[right]
            if merged not in vocab:
                vocab[merged] = len(vocab)
                merges.append((CHARACTERS[left], CHARACTERS[right]))
    return json.dumps(tiktoken_file.tree(vocab | {END: 9_999}, merges, pattern, {END: 9_999}))


@pytest.fixture(scope="session")
def trained() -> str:
    return build.train(TEXTS, VOCAB, END)


@pytest.fixture(scope="session")
def tokens(trained) -> list[bytes]:
    """Of the trained tokenizer, EOS left out, in the order in which they were learnt."""
    vocab = json.loads(trained)["model"]["vocab"]
    in_order = sorted(vocab, key=vocab.__getitem__)
    return [bytes(BYTES[character] for character in token) for token in in_order if token != END]


@pytest.fixture(scope="session")
def ranks_file(tokens) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@pytest.fixture(scope="session", params=["gpt2", "arcade100k"])
def scheme(request, tokens) -> Scheme:
    """A scheme of the small tokenizer that splits text as the real one does."""
    return Scheme(len(tokens), SCHEMES[request.param].pattern, {END: len(tokens)})


@pytest.fixture(scope="session")
def tokenizer_json(scheme, tokens) -> str:
    return tiktoken_file.tokenizer_json(tokens, scheme, "test")
