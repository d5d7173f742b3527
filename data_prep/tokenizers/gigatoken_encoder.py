"""Encode with gigatoken, the fast library: check whether it supports a tokenizer exactly, and limit its memory.

gigatoken ignores parts of a tokenizer.json that it does not know. Therefore only kinds of tokenizers that were compared with
the reference are accepted. The reference encodes documents with characters that gigatoken treats differently
(`unicode_differences`). gigatoken's caches of words grow without limit, so the tokenizer is loaded again after they have
grown by `MAX_CACHE_BYTES`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tandem.data_prep.tokenizers import unicode_differences
from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE
from tandem.data_prep.tokenizers.tiktoken_file import SCHEMES

EncodedTexts = tuple[np.ndarray, np.ndarray]
"""The concatenated ids of documents, and the length of each."""
MAX_CACHE_BYTES = 160 << 20
"""Limit of the word caches. A gigabyte of real text fills about 100 MB. Text of unique words fills 10 times its own size."""
STATM_PATH = Path("/proc/self/statm")
SUPPORTED_SPLIT_PATTERNS = frozenset(scheme.split_pattern for scheme in SCHEMES.values() if scheme.split_pattern)


def unsupported_reason(tree: Mapping[str, Any]) -> str | None:
    """Return why gigatoken must not encode with this tokenizer.json; None if it may."""
    if find_spec("gigatoken") is None:
        return "gigatoken is not installed"
    if not STATM_PATH.exists():
        return f"the memory of gigatoken cannot be measured without {STATM_PATH}"
    model, added = tree["model"], tree.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return "gigatoken supports only byte-level BPE"
    alphabet = set(BYTE_TO_UNICODE.values())
    if set("".join(model["vocab"])) - alphabet or alphabet - model["vocab"].keys():
        return "its vocabulary is not that of a byte-level BPE"
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its model has dropout, a prefix or a suffix, which gigatoken ignores"
    if len({merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]}) < len(model["merges"]):
        return "it lists a merge twice"
    if tree.get("normalizer") is not None:
        return "it normalizes text"
    if not _has_supported_split(tree.get("pre_tokenizer") or {}):
        return "its pre-tokenizer is not one of those compared with gigatoken"
    if not all(token["special"] for token in added):
        content = next(token["content"] for token in added if not token["special"])
        return f"its added token {content!r} is not special, so it is matched inside text"
    return None


def _has_supported_split(split: Mapping[str, Any]) -> bool:
    if split.get("type") != "Sequence":
        return _is_byte_level(split, use_regex=True)
    match split["pretokenizers"]:
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", **rest}, last]:
            return (
                pattern in SUPPORTED_SPLIT_PATTERNS and not rest.get("invert") and _is_byte_level(last, use_regex=False)
            )
    return False


def _is_byte_level(split: Mapping[str, Any], use_regex: bool) -> bool:
    found = (split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True))
    return found == ("ByteLevel", False, use_regex)


class GigatokenEncoder:
    """Encodes with gigatoken, on the calling thread. `reference` encodes the documents that gigatoken treats differently."""

    def __init__(self, tokenizer_json: str, reference: Callable[[Sequence[str]], EncodedTexts]):
        tree = orjson.loads(tokenizer_json)
        tree["added_tokens"] = []  # a special token in a document is plain text
        self._tokenizer_json = orjson.dumps(tree)
        self._reference = reference
        self._reload_tokenizer()

    def _reload_tokenizer(self) -> None:
        # gigatoken imports awkward in its first call, and returns lists from then on if that import fails, for example because
        # of an interrupt. An import here raises the error instead.
        import awkward  # noqa: F401
        from gigatoken import Tokenizer

        self._tokenizer: Tokenizer | None = None  # frees the old one before the new one is loaded
        self._tokenizer = Tokenizer.from_json(self._tokenizer_json)
        self._cache_bytes = 0

    def __call__(self, texts: Sequence[str]) -> EncodedTexts:
        if self._cache_bytes > MAX_CACHE_BYTES:
            self._reload_tokenizer()
        utf8 = [text.encode() for text in texts]
        reference_indices = unicode_differences.find_differing_texts(texts, utf8)
        for index in reference_indices:
            utf8[index] = b""
        flat, starts = self._encode(utf8)
        lengths = np.diff(starts)
        if reference_indices:
            ids, counts = self._reference([texts[index] for index in reference_indices])
            flat = np.insert(flat, np.repeat(starts[reference_indices], counts), ids)
            lengths[reference_indices] = counts
        return flat, lengths

    def _encode(self, utf8: list[bytes]) -> EncodedTexts:
        """Return the ids of all documents, the start of each, and the end of the last."""
        assert self._tokenizer is not None
        before = _resident_bytes()
        ragged = self._tokenizer.encode_batch(utf8, parallel=False).layout
        flat, starts = ragged.content.data, ragged.offsets.data
        # Memory that the process gained in this call, apart from the result, is cache.
        self._cache_bytes += max(0, _resident_bytes() - before - flat.nbytes)
        return flat, starts


def _resident_bytes() -> int:
    return int(STATM_PATH.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
