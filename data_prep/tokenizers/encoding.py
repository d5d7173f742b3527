"""Encode documents with the fastest library that agrees with the reference, and end each with EOS.

The text of a document is always plain text: the characters of a special token inside it are encoded like any others.
Therefore the EOS id occurs only at the ends of documents, which is checked in every batch.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from tandem.data_prep.tokenizers import distinguishing_texts, gigatoken_encoder
from tandem.data_prep.tokenizers.gigatoken_encoder import EncodedTexts, GigatokenEncoder
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data.manifest import token_dtype

LIBRARIES = ("auto", "gigatoken", "tokenizers")
LIBRARY_OPTION = "--tokenizer-library"
LONG_TEXT_CHARACTERS = 16 << 20
"""Length of a document from which on its memory is estimated first."""
TOKENIZERS_BYTES_PER_CHARACTER = 163
"""Memory that tokenizers takes for a text, measured with 30 MB of random words: 4.9 GB."""

CGROUP_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files of versions 2 and 1 with the limit of this container in bytes."""

RARE_LETTER = "\U00010380"
"""Ugaritic alpa. No normalizer changes it, and no vocabulary but one of bytes has it."""


@dataclass(frozen=True)
class EncoderSpec:
    """Everything a worker needs to encode."""

    tokenizer_json: str
    """The given text with EOS marked as special."""
    eos_token: str
    eos_id: int
    vocab_size: int
    """One more than the largest id."""
    library: str
    """gigatoken or tokenizers, which give the same tokens."""
    unk_id: int | None = None
    """Id of text that the tokenizer does not know; None if it knows all text."""

    def load(self) -> "DocumentEncoder":
        """Return the encoder, which is not thread-safe. The first call in a process takes half a second."""
        return _load_encoder(self)


class DocumentEncoder:
    """Encodes documents, fastest in batches of 1 to 8 MB of text."""

    def __init__(self, spec: EncoderSpec, reference: "ReferenceEncoder"):
        self._uses_tokenizers = spec.library == "tokenizers"
        self._encode_texts: Callable[[Sequence[str]], EncodedTexts] = reference
        if spec.library == "gigatoken":
            self._encode_texts = GigatokenEncoder(spec.tokenizer_json, reference)
        self._dtype = np.dtype(token_dtype(spec.vocab_size))
        self._eos_id = spec.eos_id

    def __call__(self, texts: Sequence[str], locations: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all documents (uint16 or uint32), EOS after each, and the lengths with EOS (int64).

        Raises: UserError naming the location (or index) of a document whose text yields the EOS id.
        """
        if self._uses_tokenizers and (longest := max(map(len, texts), default=0)) > LONG_TEXT_CHARACTERS:
            _check_memory(
                longest, locations[[*map(len, texts)].index(longest)] if locations is not None else "a document"
            )
        flat, counts = self._encode_texts(texts)
        lengths = counts + 1
        ends = np.cumsum(lengths) - 1
        inside = np.flatnonzero(flat == self._eos_id)
        if len(inside):
            index = int(np.searchsorted(np.cumsum(counts), inside[0], side="right"))
            location = locations[index] if locations is not None else f"document {index}"
            raise UserError(
                f"{location}: its text yields the EOS id {self._eos_id}; EOS may only end documents; "
                "choose another --eos or tokenizer"
            )
        tokens = np.empty(len(flat) + len(counts), self._dtype)
        is_text = np.ones(len(tokens), bool)
        is_text[ends] = False
        tokens[is_text] = flat
        tokens[ends] = self._eos_id
        return tokens, lengths


def _check_memory(num_characters: int, location: str) -> None:
    """Raises: UserError if tokenizers would run out of memory, because it then ends the process."""
    needed_bytes = num_characters * TOKENIZERS_BYTES_PER_CHARACTER
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # counts what the system can take back from its caches
        lines = Path("/proc/meminfo").read_text().splitlines()
        free_bytes = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    for limit in CGROUP_MEMORY_LIMITS:  # of a container
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            free_bytes = min(free_bytes, int(Path(limit).read_text()))
    if needed_bytes > free_bytes:
        raise UserError(
            f"{location}: tokenizers needs about {needed_bytes >> 30:,} GiB of memory for its {num_characters:,} characters, "
            f"but {free_bytes >> 30:,} GiB are free; split it, or use a machine with more memory"
        )


@lru_cache(maxsize=2)
def _load_encoder(spec: EncoderSpec) -> DocumentEncoder:
    return DocumentEncoder(spec, _reference_encoder(spec.tokenizer_json))


class ReferenceEncoder:
    """Encodes with tokenizers, on the calling thread: the reference for every other library."""

    def __init__(self, tokenizer_json: str):
        self.tokenizer_json = tokenizer_json

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use, because it takes a second and 100 MB and gigatoken rarely needs it."""
        # Use one thread, because a worker uses one core. tokenizers has no other switch for this.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> EncodedTexts:
        try:
            encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (
            Exception
        ) as error:  # tokenizers raises nothing narrower, for text without a token and without an unk_token
            raise UserError(
                f"--tokenizer: cannot encode every text ({' '.join(str(error).split())[:200]}); name one that knows all text, "
                "or has a token for unknown text"
            ) from None
        ids = [np.array(encoding.ids, np.uint32) for encoding in encoded]
        return np.concatenate([*ids, np.empty(0, np.uint32)]), np.array([len(part) for part in ids], np.int64)


_reference_encoder = lru_cache(maxsize=1)(ReferenceEncoder)


def select_encoder(
    tokenizer_json: str, eos_token: str, error_prefix: str, *, library: str = "auto", sample_texts: Sequence[str] = ()
) -> EncoderSpec:
    """Return the encoder of a tokenizer.json.

    `auto` uses gigatoken if it agrees with tokenizers on the sample and on the distinguishing texts. Otherwise it prints
    the reason and uses tokenizers.

    Raises: UserError, starting with `error_prefix`, if this is not a tokenizer, has no EOS, or encodes plain text as EOS.
    UserError also if gigatoken is requested and cannot encode with this tokenizer.
    """
    if library not in LIBRARIES:
        raise UserError(f"{LIBRARY_OPTION}: {library} is not known; use one of {', '.join(LIBRARIES)}")
    try:
        tree: dict[str, Any] = orjson.loads(tokenizer_json)
        for added in tree["added_tokens"]:
            # Matching can be turned off only for special tokens. An EOS without this mark would be matched in text.
            added["special"] = added["special"] or added["content"] == eos_token
        text = orjson.dumps(tree).decode()
        ids = _reference_encoder(text).tokenizer.get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{error_prefix}: is not a tokenizer.json ({reason}); name a file in the format of the tokenizers library"
        ) from None
    if eos_token not in ids:
        raise UserError(
            f"{error_prefix}: has no token {eos_token!r}, which ends documents; name the EOS of the tokenizer with --eos"
        )
    model = tree["model"]
    if model.get("dropout"):
        raise UserError(
            f"{error_prefix}: model.dropout is {model['dropout']}, so the ids of a text are random; set it to null in the file"
        )
    unk_id = ids.get(model.get("unk_token"), model.get("unk_id"))
    reference_spec = EncoderSpec(text, eos_token, ids[eos_token], max(ids.values()) + 1, "tokenizers", unk_id)
    reference_spec.load()([eos_token, f"a{eos_token}b {eos_token}"], [f"{error_prefix} ({eos_token!r} as text)"] * 2)
    if library == "tokenizers":
        return reference_spec
    unsupported_reason = gigatoken_encoder.unsupported_reason(tree) or _find_difference(reference_spec, sample_texts)
    if unsupported_reason is None:
        return replace(reference_spec, library="gigatoken")
    if library == "gigatoken":
        raise UserError(
            f"{LIBRARY_OPTION}: gigatoken cannot encode with {error_prefix}, because {unsupported_reason}; remove the option"
        )
    safe_print(
        f"{LIBRARY_OPTION}: using tokenizers, which is slower than gigatoken, for {error_prefix}, because {unsupported_reason}"
    )
    return reference_spec


def drops_unknown_text(spec: EncoderSpec) -> bool:
    """Return whether a rare letter gives no token, as in a BPE without an unk_token and without the bytes of all text."""
    _, lengths = replace(spec, library="tokenizers").load()([RARE_LETTER])
    return int(lengths[0]) == 1


def _find_difference(reference_spec: EncoderSpec, sample_texts: Sequence[str]) -> str | None:
    """Describe the first text that gigatoken and tokenizers encode differently; None if there is none."""
    texts = [*distinguishing_texts.fixed_texts(), *distinguishing_texts.sample_excerpts(sample_texts)]
    tokens, lengths = reference_spec.load()(texts)
    try:
        others, counts = replace(reference_spec, library="gigatoken").load()(texts)
    except RuntimeError as error:  # gigatoken cannot read the tokenizer.json
        return f"gigatoken cannot read it ({' '.join(str(error).split())[:200]})"
    starts, other_starts = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
    for index, text in enumerate(texts):
        own = tokens[starts[index] : starts[index] + lengths[index]]
        if not np.array_equal(own, others[other_starts[index] : other_starts[index] + counts[index]]):
            return f"gigatoken gives other tokens for {text[:60]!a}"
    return None
