"""Documents to tokens: by the fastest library that gives what the reference gives, each document ended by EOS.

The one idea: the text of a document is only ever text. The characters of a special token inside it are encoded like
any others, so the EOS id ends documents and occurs nowhere else, which is checked on every batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from tandem.data_prep.tokenizers import distinguishing_texts, gigatoken_encoder
from tandem.data_prep.tokenizers.gigatoken_encoder import Fast, Ids
from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import dtype_of

LIBRARIES = ("auto", "gigatoken", "tokenizers")
OPTION = "--tokenizer-library"


@dataclass(frozen=True)
class Encoder:
    """All a worker needs to encode."""

    tokenizer_json: str
    """As given, but that EOS is marked as special."""
    eos: str
    eos_id: int
    vocab: int
    """One more than the largest id."""
    library: str
    """gigatoken or tokenizers; the tokens are the same."""

    def load(self) -> Encode:
        """What encodes; made once in a process, which takes half a second, and not for several threads."""
        return _loaded(self)


class Encode:
    """Documents to tokens.  Batches of 1 to 8 MB of text are encoded fastest."""

    def __init__(self, using: Encoder, reference: Reference):
        self._ids: Callable[[Sequence[str]], Ids] = reference
        if using.library == "gigatoken":
            self._ids = Fast(using.tokenizer_json, reference)
        self._dtype = np.dtype(dtype_of(using.vocab))
        self._eos, self._eos_id = using.eos, using.eos_id

    def __call__(self, texts: Sequence[str], places: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all documents, uint16 or uint32, EOS after each; and how many each has, EOS among them, int64.

        Raises: UserError naming by its place (or number) a document whose own text yields the EOS id.
        """
        flat, counts = self._ids(texts)
        lengths = counts + 1
        ends = np.cumsum(lengths) - 1
        inside = np.flatnonzero(flat == self._eos_id)
        if len(inside):
            index = int(np.searchsorted(np.cumsum(counts), inside[0], side="right"))
            place = places[index] if places is not None else f"document {index}"
            raise UserError(
                f"{place}: its text yields the EOS id {self._eos_id}; EOS may only end documents; "
                "choose another --eos or tokenizer"
            )
        tokens = np.empty(len(flat) + len(counts), self._dtype)
        is_text = np.ones(len(tokens), bool)
        is_text[ends] = False
        tokens[is_text] = flat
        tokens[ends] = self._eos_id
        return tokens, lengths


@lru_cache(maxsize=2)
def _loaded(using: Encoder) -> Encode:
    return Encode(using, _reference(using.tokenizer_json))


class Reference:
    """Ids by tokenizers, on the calling thread: what every library here is held against."""

    def __init__(self, tokenizer_json: str):
        self.json = tokenizer_json

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Made when it is first needed, which with another library is seldom or never; it takes 100 MB and a second."""
        # One thread: a worker is one core. tokenizers has no other switch than this.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> Ids:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, np.uint32) for encoding in encoded]
        return np.concatenate([*ids, np.empty(0, np.uint32)]), np.array([len(part) for part in ids], np.int64)


@lru_cache(maxsize=1)
def _reference(tokenizer_json: str) -> Reference:
    return Reference(tokenizer_json)


def encoder(tokenizer_json: str, eos: str, where: str, *, library: str = "auto", sample: Sequence[str] = ()) -> Encoder:
    """The encoder of a tokenizer.json, with the library asked for; `auto` is gigatoken where that gives the tokens of
    tokenizers on the sample and on texts made to tell them apart, else tokenizers, and a line is printed that says why.

    Raises: UserError, starting with `where`, if it is no tokenizer, has no EOS or makes EOS out of plain text; or if
    gigatoken was asked for and cannot encode with it.
    """
    if library not in LIBRARIES:
        raise UserError(f"{OPTION}: {library}; must be one of {', '.join(LIBRARIES)}; change it")
    tree = _tree(tokenizer_json, eos, where)
    text = orjson.dumps(tree).decode()
    reference = _reference(text)
    ids = _vocabulary(reference, where)
    if eos not in ids:
        raise UserError(f"{where}: has no token {eos!r}; documents end with it; name the tokenizer's with --eos")
    made = Encoder(text, eos, ids[eos], max(ids.values()) + 1, "tokenizers")
    made.load()([eos, f"a{eos}b {eos}"], [f"{where} ({eos!r} as text)"] * 2)
    if library == "tokenizers":
        return made
    obstacle = gigatoken_encoder.obstacle(tree) or _difference(made, sample)
    if obstacle is None:
        return replace(made, library="gigatoken")
    if library == "gigatoken":
        raise UserError(f"{OPTION}: gigatoken cannot encode with {where}; {obstacle}; leave the option away")
    print(f"{OPTION}: tokenizers, which is slower; not gigatoken with {where}: {obstacle}")
    return made


def _tree(tokenizer_json: str, eos: str, where: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = orjson.loads(tokenizer_json)
        for added in tree["added_tokens"]:
            # Only tokens marked special can be switched off in text; an EOS that is not marked would be matched.
            added["special"] = added["special"] or added["content"] == eos
    except (ValueError, KeyError, TypeError) as error:
        raise _no_tokenizer(where, error) from None
    return tree


def _vocabulary(reference: Reference, where: str) -> dict[str, int]:
    try:
        return dict(reference.tokenizer.get_vocab(with_added_tokens=True))
    except Exception as error:  # tokenizers raises nothing narrower
        raise _no_tokenizer(where, error) from None


def _no_tokenizer(where: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{where}: is not a tokenizer.json ({reason}); name one in the format of tokenizers")


def _difference(made: Encoder, sample: Sequence[str]) -> str | None:
    """Of the tokens that gigatoken and tokenizers make of the sample and the traps; None where there is none."""
    texts = [*distinguishing_texts.texts(), *distinguishing_texts.excerpts(sample)]
    tokens, lengths = made.load()(texts)
    try:
        others, counts = replace(made, library="gigatoken").load()(texts)
    except RuntimeError as error:  # what gigatoken raises for a tokenizer.json it cannot read
        return f"it cannot be read ({' '.join(str(error).split())[:200]})"
    starts, other_starts = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
    for index, text in enumerate(texts):
        own = tokens[starts[index] : starts[index] + lengths[index]]
        if not np.array_equal(own, others[other_starts[index] : other_starts[index] + counts[index]]):
            return f"it makes other tokens of {text[:60]!a}"
    return None
