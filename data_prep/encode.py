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
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import content_hash
from tandem.data_prep.readers import Document
from tandem.data_prep.settings import PrepareSettings
from tandem.data_prep.spill import Spill
from tandem.data_prep.tokenizers.encoding import DocumentEncoder
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.config import UserError
from tandem.trainer.disk import atomic_write

BATCH_CHARACTERS = 1 << 20
MAX_SPILL_BYTES = 256 << 20
"""Of ids held by a worker before they are written: the greater part of its memory."""
MAX_SPILL_DOCUMENTS = 1 << 20
"""Documents held, at most: of very short ones the signatures outweigh the ids."""
NO_GROUP = ""


def is_finished(work_folder: Path, unit: WorkUnit) -> bool:
    """Whether the unit was encoded, now or before."""
    return spill.record_path(work_folder, unit.name).exists()


def bands_path(source_spill: Spill) -> Path:
    """Signatures of the spill's documents, as `duplicates` wants them."""
    return source_spill.index_path.with_suffix(".bands.npy")


def encode_unit(
    settings: PrepareSettings,
    encode_texts: DocumentEncoder,
    work_folder: Path,
    unit: WorkUnit,
    advance: ProgressCallback,
) -> None:
    """The unit's spills and its record are on disk.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    counts: Counter[str] = Counter()
    groups: dict[str, int] = {}
    buffer, num_spills, num_encoded = _SpillBuffer(), 0, 0
    for batch in _batch_documents(documents_to_encode(settings, unit, counts, advance)):
        texts = [document.text for document in batch]
        tokens, lengths = encode_texts(texts, [document.location for document in batch])
        buffer.tokens.append(tokens)
        buffer.lengths.append(lengths)
        buffer.entries.append(_index_entries(settings, batch, buffer.num_documents, groups))
        if settings.deduplicate:
            buffer.signatures.append(minhash.signatures(texts))
        buffer.num_documents += len(batch)
        buffer.num_bytes += tokens.nbytes
        if buffer.num_bytes >= MAX_SPILL_BYTES or buffer.num_documents >= MAX_SPILL_DOCUMENTS:
            buffer.write(Spill(work_folder, unit.name, num_spills))
            num_encoded, num_spills, buffer = num_encoded + buffer.num_documents, num_spills + 1, _SpillBuffer()
    if buffer.num_documents:
        buffer.write(Spill(work_folder, unit.name, num_spills))
        num_encoded, num_spills = num_encoded + buffer.num_documents, num_spills + 1
    record = {
        "spills": num_spills,
        "documents": num_encoded,
        "groups": list(groups) or [NO_GROUP],
        "counts": dict(sorted(counts.items())),
        "parts": [[part.file.name, content_hash(part)] for part in unit.parts],
    }
    atomic_write(spill.record_path(work_folder, unit.name), json.dumps(record))


@dataclass
class _SpillBuffer:
    """Encoded batches of a unit that are not written yet."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    entries: list[np.ndarray] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    num_documents: int = 0
    num_bytes: int = 0

    def write(self, target: Spill) -> None:
        if self.signatures:
            duplicates.write_bands(bands_path(target), np.concatenate(self.signatures))
        target.write(self.tokens, np.concatenate(self.lengths), np.concatenate(self.entries))


def shuffle_key(seed: int, document: Document) -> int:
    """The document's place in the global shuffle, 64 bits that depend on seed, place and text alone."""
    place = document.location.encode(errors="surrogateescape")  # names of files need not be UTF-8
    return xxh3_64_intdigest(document.text.encode() + b"\0" + place + pack("<q", seed))


def _index_entries(
    settings: PrepareSettings, batch: list[Document], first_document: int, groups: dict[str, int]
) -> np.ndarray:
    entries = np.zeros(len(batch), spill.ENTRY_DTYPE)
    entries["shuffle_key"] = [shuffle_key(settings.seed, document) for document in batch]
    entries["document"] = np.arange(first_document, first_document + len(batch))
    if settings.held_out:
        entries["held_out"] = [clean.uniform_hash(document.text) < settings.held_out for document in batch]
    if settings.group_field:
        names = [_field_value(document, settings.group_field) for document in batch]
        group_indices = [groups.setdefault(name, len(groups)) for name in names]
        if len(groups) > spill.MAX_GROUPS:
            raise UserError(
                f"--group-field: {settings.group_field} has more than {spill.MAX_GROUPS:,} values by {batch[-1].location}; "
                "must be a field of few values; name another"
            )
        entries["group"] = group_indices
    return entries


def documents_to_encode(
    settings: PrepareSettings, unit: WorkUnit, counts: Counter[str], advance: ProgressCallback
) -> Iterator[Document]:
    """The unit's documents that are to be encoded, as they are to be encoded."""
    field_names = [name.split(".")[0] for name in (settings.group_field, settings.where and settings.where[0]) if name]
    for part in unit.parts:
        try:
            for document in readers.read_documents(part, settings.text_field, field_names, advance):
                if not document.text:
                    counts["empty_documents"] += 1
                elif settings.where and _field_value(document, settings.where[0]) != settings.where[1]:
                    counts["filtered_documents"] += 1
                elif (text := clean.clean_text(document.text, settings.cleaning, counts)) is not None:
                    yield Document(document.location, text, document.fields)
        except readers.UndecodableText:
            if not settings.skip_undecodable:
                raise
            counts["undecodable_files"] += 1
            advance(part.size_bytes)
        counts["files"] += part.index == 0


def _field_value(document: Document, field_name: str) -> str:
    """The value of a dotted field as text; NO_GROUP where there is none."""
    value: Any = document.fields
    for name in field_name.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return NO_GROUP if value is None else str(value)


def _batch_documents(documents: Iterator[Document]) -> Iterator[list[Document]]:
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
