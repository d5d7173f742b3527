"""Parts of files as documents, in their order.

The readers are ours, not datatrove's: its reader takes 165-175 MB/s a core from JSONL where orjson takes 570, and
counts its documents by task, so that another number of tasks is another corpus. pyarrow opens the compressed streams
because it reports a truncated zstd file, which the zstandard package reads as a short one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet

from tandem.data_prep.executor import Advance
from tandem.data_prep.input_files import READ_BYTES, Part, check_unchanged, unreadable
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

BATCH_BYTES, LARGEST_BATCH_ROWS = 8 << 20, 1024
"""Of parquet read at once. Rows are bounded too: metadata counts a text that is stored once for many rows only once."""


class Undecodable(UserError):
    """A text file that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class Document:
    place: str
    """The name of its file, and the byte (of the text of the file) or row where a file holds several."""
    text: str
    fields: dict[str, Any]
    """What else its record says."""


def documents(part: Part, text_field: str, more_fields: list[str], advance: Advance) -> Iterator[Document]:
    """The documents of one part in their order; empty ones too. `more_fields` are wanted besides the text;
    `advance` is told how many bytes of the file were read since it was last.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    file = part.input
    check_unchanged(part)
    try:
        with remote_files.opened(file.address) as opened:
            if file.is_parquet:
                yield from _parquet_rows(part, opened, text_field, more_fields)
                advance(part.bytes)
            elif file.is_records:
                yield from _json_lines(part, opened, text_field, advance)
            else:
                yield Document(file.name, _decoded(opened.read(), file.address), {})
                advance(part.bytes)
    except (UserError, OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        if not isinstance(error, remote_files.Unreachable):
            check_unchanged(part)  # one that is being written is first of all that
        if isinstance(error, UserError):
            raise
        raise unreadable(file.address, error) from None
    check_unchanged(part)


def _json_lines(part: Part, opened: BinaryIO, text_field: str, advance: Advance) -> Iterator[Document]:
    file, (start, end) = part.input, part.range
    codec = file.codec
    if codec and not file.bytes:
        raise OSError("Truncated: not even a file of no lines is empty when it is compressed")
    if start:
        opened.seek(start - 1)
        start += len(opened.readline()) - 1  # the line that began in the part before belongs to it
    lines = io.BufferedReader(pyarrow.CompressedInputStream(opened, codec), READ_BYTES) if codec else opened
    place, number, told = start, 0, part.range[0]
    try:
        for line in lines:
            if not codec and place >= end:
                break
            number += 1
            if not line.isspace():
                try:
                    record = _record(line, text_field)
                except ValueError as error:
                    raise UserError(f"{file.address}:{_lines_before(part, start) + number}: {error}") from None
                yield Document(f"{file.name}:{place}", record.pop(text_field), record)
            place += len(line)
            now = opened.tell() if codec else place
            if now - told >= READ_BYTES:
                advance(now - told)
                told = now
    except OSError as error:
        raise unreadable(f"{file.address}:{_lines_before(part, start) + number + 1}", error) from None
    advance(max(0, end - told))


def _lines_before(part: Part, start: int) -> int:
    """Lines of a plain file before byte `start`: only asked for when something is wrong."""
    if not start:
        return 0
    count = 0
    with remote_files.opened(part.input.address) as opened:
        while start and (block := opened.read(min(READ_BYTES, start))):
            count += block.count(b"\n")
            start -= len(block)
    return count


def _record(line: bytes, text_field: str) -> dict[str, Any]:
    """Raises: ValueError with what is wrong and what to do."""
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}); correct or remove the line") from None
    if not isinstance(record, dict) or text_field not in record:
        known = ", ".join(map(str, record))[:200] if isinstance(record, dict) else "no fields"
        raise ValueError(f"has no field {text_field!r}; there is {known}; name the text with --text-field")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise ValueError(f"field {text_field!r} is {kind}; must be text; name another with --text-field")
    return record


def _parquet_rows(part: Part, opened: BinaryIO, text_field: str, more_fields: list[str]) -> Iterator[Document]:
    file = part.input
    table = pyarrow.parquet.ParquetFile(opened, buffer_size=BATCH_BYTES, pre_buffer=False)
    schema = table.schema_arrow
    columns = [text_field, *(name for name in more_fields if name in schema.names)]
    if text_field not in schema.names:
        known = ", ".join(schema.names)[:200]
        raise UserError(
            f"{file.address}: has no field {text_field!r}; there is {known}; name the text with --text-field"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file.address}: field {text_field!r} is {kind}; must be text; name another with --text-field")
    groups = table.num_row_groups
    first, last = groups * part.number // part.count, groups * (part.number + 1) // part.count
    number = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for group in range(first, last):
        rows = _batch_rows(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
            for record in _records(batch, file.address):
                number += 1
                text = record.pop(text_field)
                if text is None:
                    raise UserError(f"{file.address}: row {number} has no {text_field!r}; correct or remove the row")
                yield Document(f"{file.name}:{number}", text, record)


def _records(batch: pyarrow.RecordBatch, address: str) -> list[dict[str, Any]]:
    try:
        records: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # nanoseconds, or a year beyond 9999
        raise unreadable(address, error) from None
    return records


def _batch_rows(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return min(max(1, BATCH_BYTES * group.num_rows // max(1, size)), LARGEST_BATCH_ROWS)


def _decoded(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert it, or leave such files out with --skip-undecodable"
        ) from None
