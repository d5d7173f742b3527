"""One unit of the inputs encoded: its documents read, cleaned, turned into ids and laid out for the shuffle.

A unit leaves some spills (`spill`), the signatures of its documents where duplicates are looked for, and, last,
a record of what it counted. A unit with a record is finished; anything else of it is of a killed worker and is written
again, the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.data_prep import clean, duplicates, minhash, readers, spill
from tandem.data_prep.executor import Advance
from tandem.data_prep.input_files import content_hash
from tandem.data_prep.readers import Document
from tandem.data_prep.settings import Settings
from tandem.data_prep.spill import Spill
from tandem.data_prep.tokenizers.encoding import Encode
from tandem.data_prep.work_units import Unit
from tandem.trainer.config import UserError
from tandem.trainer.disk import write_whole

BATCH_CHARACTERS = 1 << 20
SPILL_BYTES = 256 << 20
"""Of ids held by a worker before they are written: the greater part of its memory."""
SPILL_DOCUMENTS = 1 << 20
"""Documents held, at most: of very short ones the signatures outweigh the ids."""
NO_GROUP = ""


def is_finished(work: Path, unit: Unit) -> bool:
    """Whether the unit was encoded, now or before."""
    return spill.record_path(work, unit.name).exists()


def bands_path(of: Spill) -> Path:
    """Signatures of the spill's documents, as `duplicates` wants them."""
    return of.index_path.with_suffix(".bands.npy")


def encode(settings: Settings, encode_texts: Encode, work: Path, unit: Unit, advance: Advance) -> None:
    """The unit's spills and its record are on disk.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    counts: Counter[str] = Counter()
    groups: dict[str, int] = {}
    held, spills, encoded = _Held(), 0, 0
    for batch in _batches(documents(settings, unit, counts, advance)):
        texts = [document.text for document in batch]
        tokens, lengths = encode_texts(texts, [document.place for document in batch])
        held.tokens.append(tokens)
        held.lengths.append(lengths)
        held.entries.append(_entries(settings, batch, held.documents, groups))
        if settings.deduplicate:
            held.signatures.append(minhash.signatures(texts))
        held.documents += len(batch)
        held.bytes += tokens.nbytes
        if held.bytes >= SPILL_BYTES or held.documents >= SPILL_DOCUMENTS:
            held.write(Spill(work, unit.name, spills))
            encoded, spills, held = encoded + held.documents, spills + 1, _Held()
    if held.documents:
        held.write(Spill(work, unit.name, spills))
        encoded, spills = encoded + held.documents, spills + 1
    record = {
        "spills": spills,
        "documents": encoded,
        "groups": list(groups) or [NO_GROUP],
        "counts": dict(sorted(counts.items())),
        "parts": [[part.input.name, content_hash(part)] for part in unit.parts],
    }
    write_whole(spill.record_path(work, unit.name), json.dumps(record))


@dataclass
class _Held:
    """Encoded batches of a unit that are not written yet."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0

    def write(self, to: Spill) -> None:
        if self.signatures:
            duplicates.write_bands(bands_path(to), np.concatenate(self.signatures))
        to.write(self.tokens, np.concatenate(self.lengths), np.concatenate(self.entries))


def rank(seed: int, document: Document) -> int:
    """The document's place in the global shuffle, 64 bits that depend on seed, place and text alone."""
    place = document.place.encode(errors="surrogateescape")  # names of files need not be UTF-8
    return xxh3_64_intdigest(document.text.encode() + b"\0" + place + pack("<q", seed))


def _entries(settings: Settings, batch: list[Document], first: int, groups: dict[str, int]) -> np.ndarray:
    entries = np.zeros(len(batch), spill.ENTRY)
    entries["rank"] = [rank(settings.seed, document) for document in batch]
    entries["document"] = np.arange(first, first + len(batch))
    if settings.held_out:
        entries["held_out"] = [clean.draw(document.text) < settings.held_out for document in batch]
    if settings.group_field:
        names = [_value(document, settings.group_field) for document in batch]
        numbers = [groups.setdefault(name, len(groups)) for name in names]
        if len(groups) > spill.MOST_GROUPS:
            raise UserError(
                f"--group-field: {settings.group_field} has more than {spill.MOST_GROUPS:,} values by {batch[-1].place}; "
                "must be a field of few values; name another"
            )
        entries["group"] = numbers
    return entries


def documents(settings: Settings, unit: Unit, counts: Counter[str], advance: Advance) -> Iterator[Document]:
    """The unit's documents that are to be encoded, as they are to be encoded."""
    wanted = [name.split(".")[0] for name in (settings.group_field, settings.where and settings.where[0]) if name]
    for part in unit.parts:
        try:
            for document in readers.documents(part, settings.text_field, wanted, advance):
                if not document.text:
                    counts["empty_documents"] += 1
                elif settings.where and _value(document, settings.where[0]) != settings.where[1]:
                    counts["other_documents"] += 1
                elif (text := clean.cleaned(document.text, settings.cleaning, counts)) is not None:
                    yield Document(document.place, text, document.fields)
        except readers.Undecodable:
            if not settings.skip_undecodable:
                raise
            counts["skipped_files"] += 1
            advance(part.bytes)
        counts["files"] += part.number == 0


def _value(document: Document, field_name: str) -> str:
    """The value of a dotted field as text; NO_GROUP where there is none."""
    value: Any = document.fields
    for name in field_name.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return NO_GROUP if value is None else str(value)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
