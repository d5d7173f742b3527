"""Libraries that make ids of text, all from one tokenizer.json: a function from texts to their ids."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from tandem.data_prep.tokenizers.byte_level import CHARACTERS
from tandem.trainer.config import UserError

EOS = "<|endoftext|>"
Library = Callable[[Sequence[str]], list[np.ndarray]]
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Source: tiktoken's gpt2."""


def ours(tokenizer_json: str) -> Library:
    from tandem.data_prep.tokenizers import encoding

    encode = encoding.encoder(tokenizer_json, EOS, "--tokenizer").load()

    def library(texts: Sequence[str]) -> list[np.ndarray]:
        tokens, lengths = encode(texts)
        ends = np.cumsum(lengths)
        return [tokens[end - length : end - 1] for end, length in zip(ends, lengths, strict=True)]

    return library


def tokenizers(tokenizer_json: str) -> Library:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer_json)
    made.encode_special_tokens = True
    return lambda texts: [
        np.array(one.ids, np.uint32) for one in made.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def tiktoken(tokenizer_json: str) -> Library:
    """Raises: UserError where the tokenizer splits text in another way than GPT-2's."""
    import tiktoken

    tree = orjson.loads(tokenizer_json)
    ranks, specials = ranks_of(tree)
    made = tiktoken.Encoding("bench", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=specials)
    return lambda texts: [np.array(made.encode_ordinary(text), np.uint32) for text in texts]


def ranks_of(tree: dict[str, Any]) -> tuple[dict[bytes, int], dict[str, int]]:
    """The ids of the tokens as bytes, which are the order of the merges too, and those of special tokens."""
    split = tree["pre_tokenizer"]
    if split["type"] != "ByteLevel" or not split.get("use_regex", True) or tree.get("normalizer"):
        raise UserError("the tokenizer does not split text as GPT-2's, the one pattern tiktoken is given here")
    specials = {added["content"]: added["id"] for added in tree["added_tokens"]}
    values = {character: value for value, character in CHARACTERS.items()}
    vocab = {word: number for word, number in tree["model"]["vocab"].items() if word not in specials}
    return {bytes(values[character] for character in word): number for word, number in vocab.items()}, specials


LIBRARIES: dict[str, Callable[[str], Library]] = {"ours": ours, "tokenizers": tokenizers, "tiktoken": tiktoken}
