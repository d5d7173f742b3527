"""Cleaning, one document at a time: Unicode form, too short, known from a benchmark; and the key that says which
texts are the same. What needs all documents at once is in duplicates.py.

The rules are SlimPajama's (Cerebras modelzoo, data_preparation/nlp/slimpajama): NFC, then documents under 200
characters without punctuation and whitespace go, then exact decontamination. Three things differ. Its script counts
one space between words, its description none; here the description holds. Its script also runs ftfy over the text,
which its description does not mention; here text is not rewritten beyond NFC. Its exact comparison is of the raw
text, so a final newline hides a copy; here the key ignores case, whitespace and punctuation.

In a pipeline, where a worker has read a document:

    rules = CleaningRules(nfc=True, min_characters=200, contaminant_keys=text_keys(texts of --decontaminate))  # pickles
    text = clean_text(document.text, rules, counts)  # None: dropped and counted; else the text to tokenize
    is_held_out = uniform_hash(text) < held_out      # copies get the same draw, so they are on the same side

`counts` is any mapping of names to numbers, summed over workers into the manifest; COUNT_NAMES names what is counted.
Order: clean first, then `minhash.signatures` of what is left, so that indices of documents are those of the
documents that are tokenized.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

from xxhash import xxh3_128_digest

SLIMPAJAMA_MIN_CHARACTERS = 200
COUNT_NAMES = ("normalized_documents", "short_documents", "contaminated_documents")
_PUNCTUATION_TABLE = str.maketrans("", "", string.punctuation)
_IGNORED_BYTES = bytes(code for code in range(128) if chr(code).isspace()) + string.punctuation.encode()
_LOWERCASE_TABLE = bytes(range(256)).lower()


@dataclass(frozen=True)
class CleaningRules:
    nfc: bool = False
    min_characters: int = 0
    """Documents with fewer characters than this, ASCII punctuation and whitespace apart, are dropped; 0 keeps all."""
    contaminant_keys: frozenset[bytes] = frozenset()
    """Keys of documents that must not be trained on."""


def clean_text(text: str, rules: CleaningRules, counts: MutableMapping[str, int]) -> str | None:
    """The text to train on, or None for a document to drop; what was done is counted under a name of COUNT_NAMES."""
    if rules.nfc and (normal := normalize_nfc(text)) is not text:
        counts["normalized_documents"] = counts.get("normalized_documents", 0) + 1
        text = normal
    if rules.min_characters and is_short(text, rules.min_characters):
        count_name = "short_documents"
    elif rules.contaminant_keys and text_key(text) in rules.contaminant_keys:
        count_name = "contaminated_documents"
    else:
        return text
    counts[count_name] = counts.get(count_name, 0) + 1
    return None


def normalize_nfc(text: str) -> str:
    """The text in Unicode normal form C: the same object where it already is."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def is_short(text: str, min_characters: int = SLIMPAJAMA_MIN_CHARACTERS) -> bool:
    """Whether fewer than `min_characters` characters are left without ASCII punctuation and whitespace."""
    # The beginning settles it for nearly every document.
    return (
        _num_counted_characters(text[: 2 * min_characters]) < min_characters
        and _num_counted_characters(text) < min_characters
    )


def _num_counted_characters(text: str) -> int:
    if text.isascii():
        return len(text.encode().translate(None, _IGNORED_BYTES))
    return sum(map(len, text.translate(_PUNCTUATION_TABLE).split()))


def text_key(text: str) -> bytes:
    """16 bytes, equal for texts that are the same but for ASCII case, whitespace and punctuation, and for Unicode
    form: what a copy loses on its way through web pages and benchmark files. Texts of punctuation alone are compared
    as they are. Different texts share a key with probability 2^-128 (XXH3)."""
    raw = normalize_nfc(text).encode(errors="surrogatepass")
    return xxh3_128_digest(raw.translate(_LOWERCASE_TABLE, _IGNORED_BYTES) or raw)


def text_keys(texts: Iterable[str]) -> frozenset[bytes]:
    """The keys of these texts, 100 bytes or so of memory each."""
    return frozenset(map(text_key, texts))


def uniform_hash(text: str) -> float:
    """A uniform number in [0, 1) that belongs to the key of this text; below the held-out share, it is held out."""
    return (int.from_bytes(text_key(text)[:8], "little") >> 11) / 2**53
