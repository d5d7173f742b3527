"""Clean one document at a time: normalize Unicode, drop short and contaminated documents. (duplicates.py finds duplicates.)

The rules are SlimPajama's (Cerebras modelzoo, data_preparation/nlp/slimpajama): NFC, then drop documents under 200 characters
(without punctuation and whitespace), then drop exact copies of benchmark texts. Three details differ:

* SlimPajama's script counts one space between words, its description counts none. We follow the description.
* Its script also runs ftfy, which its description does not mention. We change text only by NFC.
* It compares raw text exactly, so a final newline hides a copy. Our key ignores case, whitespace and punctuation.

Clean first, then compute `minhash.signatures` of the remaining documents, so that the indices of signatures and of tokenized
documents agree.
"""

import string
import unicodedata
from collections import Counter
from dataclasses import dataclass

from xxhash import xxh3_128_digest

SLIMPAJAMA_MIN_CHARACTERS = 200
_PUNCTUATION_TABLE = str.maketrans("", "", string.punctuation)
_IGNORED_BYTES = bytes(code for code in range(128) if chr(code).isspace()) + string.punctuation.encode()
_LOWERCASE_TABLE = bytes(range(256)).lower()


@dataclass(frozen=True)
class CleaningRules:
    nfc: bool = False
    min_characters: int = 0
    """Drop documents with fewer characters than this, not counting ASCII punctuation and whitespace; 0 keeps all."""
    contaminant_keys: frozenset[bytes] = frozenset()
    """`text_key` of each document that must not be used for training. A key takes about 100 bytes of memory."""


def clean_text(text: str, rules: CleaningRules, counts: Counter[str]) -> str | None:
    """Return the text to train on, or None to drop the document. Count changes and drops."""
    if rules.nfc and (normal := normalize_nfc(text)) is not text:
        counts["normalized_documents"] += 1
        text = normal
    if rules.min_characters and is_short(text, rules.min_characters):
        counts["short_documents"] += 1
        return None
    if rules.contaminant_keys and text_key(text) in rules.contaminant_keys:
        counts["contaminated_documents"] += 1
        return None
    return text


def normalize_nfc(text: str) -> str:
    """Return the text in Unicode normal form C: the same object if it already is."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def is_short(text: str, min_characters: int = SLIMPAJAMA_MIN_CHARACTERS) -> bool:
    """Return whether fewer than `min_characters` characters remain without ASCII punctuation and whitespace."""
    # For nearly every document its beginning is enough.
    return (
        _num_counted_characters(text[: 2 * min_characters]) < min_characters
        and _num_counted_characters(text) < min_characters
    )


def _num_counted_characters(text: str) -> int:
    if text.isascii():
        return len(text.encode().translate(None, _IGNORED_BYTES))
    return sum(map(len, text.translate(_PUNCTUATION_TABLE).split()))


def text_key(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that differ only in ASCII case, whitespace, punctuation or Unicode form.

    Copies in web pages and benchmark files differ in these respects. Texts of punctuation alone are compared unchanged.
    Texts that differ in other respects share a key with probability 2^-128 (XXH3).
    """
    raw = normalize_nfc(text).encode(errors="surrogatepass")
    return xxh3_128_digest(raw.translate(_LOWERCASE_TABLE, _IGNORED_BYTES) or raw)


def uniform_hash(text: str) -> float:
    """Return a uniform number in [0, 1) computed from `text_key`, so that copies of a text are in the same split."""
    return (int.from_bytes(text_key(text)[:8], "little") >> 11) / 2**53
