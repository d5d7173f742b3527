"""Tokenizer libraries. Each loads the same tokenizer.json and returns a function from texts to ids."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE
from tandem.trainer.config import UserError

EOS = "<|endoftext|>"
EncodeTexts = Callable[[Sequence[str]], list[np.ndarray]]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Source: tiktoken's gpt2."""


def load_tandem(tokenizer_json: str) -> EncodeTexts:
    from tandem.data_prep.tokenizers import encoding

    encode = encoding.select_encoder(tokenizer_json, EOS, "--tokenizer").load()

    def encode_texts(texts: Sequence[str]) -> list[np.ndarray]:
        tokens, lengths = encode(texts)
        ends = np.cumsum(lengths)
        return [tokens[end - length : end - 1] for end, length in zip(ends, lengths, strict=True)]

    return encode_texts


def load_tokenizers(tokenizer_json: str) -> EncodeTexts:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return lambda texts: [
        np.array(one.ids, np.uint32) for one in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def load_tiktoken(tokenizer_json: str) -> EncodeTexts:
    """Raises: UserError if the tokenizer does not split text like GPT-2's."""
    import tiktoken

    tree = orjson.loads(tokenizer_json)
    ranks, specials = mergeable_ranks(tree)
    tiktoken_encoding = tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return lambda texts: [np.array(tiktoken_encoding.encode_ordinary(text), np.uint32) for text in texts]


def mergeable_ranks(tree: dict[str, Any]) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return the ids of the tokens as bytes, which are also the merge order, and the ids of the special tokens."""
    split = tree["pre_tokenizer"]
    if split["type"] != "ByteLevel" or not split.get("use_regex", True) or tree.get("normalizer"):
        raise UserError("the tokenizer does not split text like GPT-2's, the only pattern that tiktoken gets here")
    specials = {added["content"]: added["id"] for added in tree["added_tokens"]}
    values = {character: value for value, character in BYTE_TO_UNICODE.items()}
    vocab = {word: number for word, number in tree["model"]["vocab"].items() if word not in specials}
    return {bytes(values[character] for character in word): number for word, number in vocab.items()}, specials


LIBRARIES: dict[str, Callable[[str], EncodeTexts]] = {
    "tandem": load_tandem,
    "tokenizers": load_tokenizers,
    "tiktoken": load_tiktoken,
}
