"""Encode one unit of the inputs: read and clean its documents, turn them into ids, and write them as spills.

The files of a unit are its spills (`spill`), the signatures of its documents with --deduplicate, and a record of its
counts, which is written last. A unit with a record is finished. Files of a unit without one are from a killed worker; they
are written again with the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from tandem.data_prep import clean, duplicates, executor, minhash, readers, spill, tar_reader, work_files
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import content_hash
from tandem.data_prep.json_values import MISSING, lookup
from tandem.data_prep.records import Document, printable
from tandem.data_prep.settings import PrepareSettings
from tandem.data_prep.spill import Spill, SpillRecord, UnitRecord
from tandem.data_prep.tokenizers.encoding import EncoderSpec
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import token_dtype

BATCH_CHARACTERS = 1 << 20
BATCH_TOKENS = 1 << 18
MAX_SPILL_BYTES = 256 << 20
"""Size of the ids that a worker holds before it writes a spill. They are most of its memory."""
MAX_SPILL_DOCUMENTS = 1 << 20
"""Limit of documents in a spill, because the signatures of very short documents are larger than their ids."""
NO_GROUP = ""
MAX_MET_VALUES, MAX_NAMED_VALUES = 1000, 10
"""Largest numbers of different values of the field of --where that are counted, and that are recorded."""


@dataclass
class UnitNotes:
    """What a unit's record tells the user besides its counts."""

    bad_records: list[str] = field(default_factory=list)
    """The first bad records that were left out, each with its place and its fault."""
    other_values: Counter[str] = field(default_factory=Counter)
    """The values of the field of --where in documents that were left out."""


def encode_unit(
    settings: PrepareSettings, encoder_spec: EncoderSpec, work_folder: Path, unit: WorkUnit, advance: ProgressCallback
) -> None:
    """Write the unit's spills and its record.

    Raises: UserError naming the file, and the line, row or member that cannot be read or lacks the text.
    """
    counts: Counter[str] = Counter()
    notes = UnitNotes()
    groups: dict[str, int] = {}
    batches = (
        _encode_texts(settings, encoder_spec, unit, groups, counts, notes, advance)
        if settings.tokens is None
        else _adopt_tokens(settings, encoder_spec, unit, counts, advance)
    )
    buffer: list[_EncodedBatch] = []
    spills: list[SpillRecord] = []

    def write_buffer() -> None:
        spills.append(_write_spill(Spill(work_folder, unit.name, len(spills)), buffer))
        buffer.clear()

    for batch in batches:
        buffer.append(batch)
        num_bytes, num_documents = sum(one.tokens.nbytes for one in buffer), sum(len(one.lengths) for one in buffer)
        if num_bytes >= MAX_SPILL_BYTES or num_documents >= MAX_SPILL_DOCUMENTS:
            write_buffer()
    if buffer:
        write_buffer()
    record = UnitRecord(
        spills,
        [_without_nul(name) for name in groups] or [NO_GROUP],
        dict(sorted(counts.items())),
        "\n".join(content_hash(part) for part in unit.parts),
        [_without_nul(sample) for sample in notes.bad_records],
        {_without_nul(value): number for value, number in notes.other_values.most_common(MAX_NAMED_VALUES)}
        if not spills
        else {},
    )
    work_files.write_record(spill.record_path(work_folder, unit.name), record)


def _without_nul(text: str) -> str:
    """Escape NUL characters, which the readers of records and manifests refuse."""
    return text.replace("\0", r"\0")


class _EncodedBatch(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray
    entries: np.ndarray
    """Complete except for `document`, `end` and `checksum`."""
    signatures: np.ndarray | None = None


def _write_spill(target: Spill, batches: list[_EncodedBatch]) -> SpillRecord:
    tokens, lengths, entries, signatures = zip(*batches, strict=True)
    bands_hash = None
    if signatures[0] is not None:
        bands_hash = duplicates.write_bands(target.bands_path, np.concatenate(signatures))
    all_entries = np.concatenate(entries)
    all_entries["document"] = np.arange(len(all_entries))
    return target.write(list(tokens), np.concatenate(lengths), all_entries, bands_hash)


def _encode_texts(
    settings: PrepareSettings, encoder_spec: EncoderSpec, unit: WorkUnit, groups: dict[str, int], counts: Counter[str],
    notes: UnitNotes, advance: ProgressCallback,
) -> Iterator[_EncodedBatch]:  # fmt: skip
    encode_texts = encoder_spec.load()
    for batch in _batch_documents(documents_to_encode(settings, unit, counts, advance, notes)):
        texts, locations = [document.text for document in batch], [document.location for document in batch]
        tokens, lengths = encode_texts(texts, locations)
        _count_unknown_tokens(encoder_spec, tokens, len(lengths), counts)
        if empty := sum(not texts[index].isspace() for index in np.flatnonzero(lengths == 1)):
            counts["documents_without_tokens"] += empty
        entries = _index_entries(settings.seed, [text.encode() for text in texts], locations)
        if settings.held_out:
            entries["held_out"] = [clean.uniform_hash(text) < settings.held_out for text in texts]
        if settings.group_field:
            entries["group"] = _group_indices(batch, settings.group_field, groups)
        signatures = minhash.signatures(texts) if settings.deduplicate else None
        yield _EncodedBatch(tokens, lengths, entries, signatures)


def _count_unknown_tokens(
    encoder_spec: EncoderSpec, tokens: np.ndarray, num_documents: int, counts: Counter[str]
) -> None:
    """Count the tokens of text that the tokenizer does not know. If EOS has the same id, each document ends with it."""
    if encoder_spec.unk_id is not None:
        num_others = num_documents if encoder_spec.unk_id == encoder_spec.eos_id else 0
        if unknown := int(np.count_nonzero(tokens == encoder_spec.unk_id)) - num_others:
            counts["unknown_tokens"] += unknown


def _adopt_tokens(
    settings: PrepareSettings, encoder_spec: EncoderSpec, unit: WorkUnit, counts: Counter[str], advance: ProgressCallback
) -> Iterator[_EncodedBatch]:  # fmt: skip
    """Yield the documents of a tokenized corpus: each sample without its padding, cut after each EOS.

    A last document without EOS gets one, because documents are shuffled and the next one belongs to another text.
    """
    assert settings.tokens is not None
    dtype, eos_id = np.dtype(token_dtype(encoder_spec.vocab_size)), encoder_spec.eos_id
    documents: list[np.ndarray] = []
    locations: list[str] = []
    batch_tokens = 0
    for part in unit.parts:
        for number, (member, ids) in enumerate(tar_reader.read_token_samples(part, settings.tokens, advance, counts)):
            kept = ids[: len(ids) - _padding_length(ids, settings.padding_id, eos_id)]
            counts["samples"] += 1
            counts["padding_tokens"] += len(ids) - len(kept)
            wrong = kept[(kept < 0) | (kept >= encoder_spec.vocab_size)]
            if len(wrong):
                raise UserError(
                    f"{part.file.address}: {printable(member)}: has id {wrong[0]}, but --tokenizer has ids 0 to "
                    f"{encoder_spec.vocab_size - 1}; name the tokenizer that made these ids, or give --padding-id if this "
                    "id is padding"
                )
            tokens = kept.astype(dtype)
            if len(tokens) and tokens[-1] != eos_id:
                tokens = np.append(tokens, dtype.type(eos_id))
                counts["added_eos_tokens"] += 1
            ends = np.flatnonzero(tokens == eos_id) + 1
            _count_unknown_tokens(encoder_spec, tokens, len(ends), counts)
            documents += np.split(tokens, ends[:-1]) if len(tokens) else []
            locations += [f"{part.file.name}:{number}:{end}" for end in ends]
            batch_tokens += len(tokens)
            if batch_tokens >= BATCH_TOKENS:
                yield _adopted_batch(settings, documents, locations)
                documents, locations, batch_tokens = [], [], 0
        counts["files"] += 1
    if documents:
        yield _adopted_batch(settings, documents, locations)


def _padding_length(ids: np.ndarray, padding_id: int | None, eos_id: int) -> int:
    """Return the number of padding ids at the end of a sample: those after an EOS, or all if the sample has no other id.

    Note: the padding id may also be a token of text. open_lm pads GPT-NeoX with 50256, a token of spaces. But padding
    begins after a whole document. If the padding id is EOS, the first EOS at the end of a sample ends its last document.
    """
    if padding_id is None:
        return 0
    others = np.flatnonzero(ids != padding_id)
    num_kept = int(others[-1]) + 1 if len(others) else 0
    if num_kept and padding_id == eos_id:
        return max(0, len(ids) - num_kept - 1)
    return len(ids) - num_kept if num_kept == 0 or ids[num_kept - 1] == eos_id else 0


def _adopted_batch(settings: PrepareSettings, documents: list[np.ndarray], locations: list[str]) -> _EncodedBatch:
    contents = [document.tobytes() for document in documents]
    entries = _index_entries(settings.seed, contents, locations)
    if settings.held_out:
        entries["held_out"] = [xxh3_64_intdigest(content) / 2**64 < settings.held_out for content in contents]
    lengths = np.array([len(document) for document in documents], np.int64)
    return _EncodedBatch(np.concatenate(documents), lengths, entries)


def _index_entries(seed: int, contents: Sequence[bytes], locations: Sequence[str]) -> np.ndarray:
    """Return index entries with their shuffle keys: 64 bits that depend only on content, location and seed."""
    entries = np.zeros(len(contents), spill.ENTRY_DTYPE)
    places = (location.encode(errors="surrogateescape") for location in locations)  # file names need not be UTF-8
    packed_seed = pack("<q", seed)
    entries["shuffle_key"] = [
        xxh3_64_intdigest(content + b"\0" + place + packed_seed)
        for content, place in zip(contents, places, strict=True)
    ]
    return entries


def _group_indices(batch: list[Document], group_field: str, groups: dict[str, int]) -> list[int]:
    indices = [groups.setdefault(_field_value(document, group_field), len(groups)) for document in batch]
    if len(groups) > spill.MAX_GROUPS:
        raise UserError(
            f"--group-field: {group_field} has more than {spill.MAX_GROUPS:,} different values, counted up to document "
            f"{batch[-1].location}; name a field with fewer values"
        )
    return indices


def documents_to_encode(
    settings: PrepareSettings, unit: WorkUnit, counts: Counter[str], advance: ProgressCallback,
    notes: UnitNotes | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Yield the unit's documents that pass the filters, with their cleaned text."""
    field_names = [name for name in (settings.group_field, settings.where and settings.where[0]) if name]
    notes = UnitNotes() if notes is None else notes
    for part in unit.parts:
        executor.note_file(part.file.address)
        documents = readers.read_documents(
            part, settings.text_field, field_names, advance, counts,
            skip_bad_records=settings.skip_bad_lines, samples=notes.bad_records,
        )  # fmt: skip
        try:
            for document in documents:
                if not document.text:
                    counts["empty_documents"] += 1
                elif settings.where and not _matches(document, settings.where, notes):
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
    """Return the value at a path as text, or NO_GROUP if the document has no such field."""
    value = lookup(document.fields, field_name)
    return NO_GROUP if value is MISSING or value is None else str(value)


def _matches(document: Document, where: tuple[str, str], notes: UnitNotes) -> bool:
    """Return whether the field has the value: as text, or as JSON (true, 5, null). Count other values in `notes`."""
    value = lookup(document.fields, where[0])
    if where[1] in (_field_value(document, where[0]), json_text := _json_text(value)):
        return True
    if json_text in notes.other_values or len(notes.other_values) < MAX_MET_VALUES:
        notes.other_values[json_text] += 1
    return False


def _json_text(value: Any) -> str:
    if isinstance(value, str) or value is MISSING:
        return value if isinstance(value, str) else "(no such field)"
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a time, a decimal or bytes in parquet
        return str(value)


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
