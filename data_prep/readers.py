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

from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import READ_BLOCK_BYTES, FilePart, check_unchanged, unreadable_error
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

PARQUET_BATCH_BYTES, MAX_PARQUET_BATCH_ROWS = 8 << 20, 1024
"""Of parquet read at once. Rows are bounded too: metadata counts a text that is stored once for many rows only once."""


class UndecodableText(UserError):
    """A text file that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class Document:
    location: str
    """The name of its file, and the byte (of the text of the file) or row where a file holds several."""
    text: str
    fields: dict[str, Any]
    """What else its record says."""


def read_documents(
    part: FilePart, text_field: str, extra_fields: list[str], advance: ProgressCallback
) -> Iterator[Document]:
    """The documents of one part in their order; empty ones too. `extra_fields` are wanted besides the text;
    `advance` is told how many bytes of the file were read since it was last.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    file = part.file
    check_unchanged(part)
    try:
        with remote_files.open_file(file.address) as stream:
            if file.is_parquet:
                yield from _read_parquet(part, stream, text_field, extra_fields)
                advance(part.size_bytes)
            elif file.is_json_lines:
                yield from _read_json_lines(part, stream, text_field, advance)
            else:
                yield Document(file.name, _decode_text(stream.read(), file.address), {})
                advance(part.size_bytes)
    except (UserError, OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        if not isinstance(error, remote_files.RemoteError):
            check_unchanged(part)  # one that is being written is first of all that
        if isinstance(error, UserError):
            raise
        raise unreadable_error(file.address, error) from None
    check_unchanged(part)


def _read_json_lines(
    part: FilePart, stream: BinaryIO, text_field: str, advance: ProgressCallback
) -> Iterator[Document]:
    file, (start, end) = part.file, part.byte_range
    compression = file.compression
    if compression and not file.size_bytes:
        raise OSError("Truncated: not even a file of no lines is empty when it is compressed")
    if start:
        stream.seek(start - 1)
        start += len(stream.readline()) - 1  # the line that began in the part before belongs to it
    lines = (
        io.BufferedReader(pyarrow.CompressedInputStream(stream, compression), READ_BLOCK_BYTES)
        if compression
        else stream
    )
    line_start, num_lines, reported_bytes = start, 0, part.byte_range[0]
    try:
        for line in lines:
            if not compression and line_start >= end:
                break
            num_lines += 1
            if not line.isspace():
                try:
                    record = _parse_record(line, text_field)
                except ValueError as error:
                    raise UserError(f"{file.address}:{_count_lines_before(part, start) + num_lines}: {error}") from None
                yield Document(f"{file.name}:{line_start}", record.pop(text_field), record)
            line_start += len(line)
            position_bytes = stream.tell() if compression else line_start
            if position_bytes - reported_bytes >= READ_BLOCK_BYTES:
                advance(position_bytes - reported_bytes)
                reported_bytes = position_bytes
    except OSError as error:
        raise unreadable_error(f"{file.address}:{_count_lines_before(part, start) + num_lines + 1}", error) from None
    advance(max(0, end - reported_bytes))


def _count_lines_before(part: FilePart, start: int) -> int:
    """Lines of a plain file before byte `start`: only asked for when something is wrong."""
    if not start:
        return 0
    count = 0
    with remote_files.open_file(part.file.address) as stream:
        while start and (block := stream.read(min(READ_BLOCK_BYTES, start))):
            count += block.count(b"\n")
            start -= len(block)
    return count


def _parse_record(line: bytes, text_field: str) -> dict[str, Any]:
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


def _read_parquet(part: FilePart, stream: BinaryIO, text_field: str, extra_fields: list[str]) -> Iterator[Document]:
    file = part.file
    table = pyarrow.parquet.ParquetFile(stream, buffer_size=PARQUET_BATCH_BYTES, pre_buffer=False)
    schema = table.schema_arrow
    columns = [text_field, *(name for name in extra_fields if name in schema.names)]
    if text_field not in schema.names:
        known = ", ".join(schema.names)[:200]
        raise UserError(
            f"{file.address}: has no field {text_field!r}; there is {known}; name the text with --text-field"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file.address}: field {text_field!r} is {kind}; must be text; name another with --text-field")
    groups = table.num_row_groups
    first, last = groups * part.index // part.num_parts, groups * (part.index + 1) // part.num_parts
    row_index = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for group in range(first, last):
        rows = _rows_per_batch(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
            for record in _batch_records(batch, file.address):
                row_index += 1
                text = record.pop(text_field)
                if text is None:
                    raise UserError(f"{file.address}: row {row_index} has no {text_field!r}; correct or remove the row")
                yield Document(f"{file.name}:{row_index}", text, record)


def _batch_records(batch: pyarrow.RecordBatch, address: str) -> list[dict[str, Any]]:
    try:
        records: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # nanoseconds, or a year beyond 9999
        raise unreadable_error(address, error) from None
    return records


def _rows_per_batch(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return min(max(1, PARQUET_BATCH_BYTES * group.num_rows // max(1, size)), MAX_PARQUET_BATCH_ROWS)


def _decode_text(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UndecodableText(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert it, or leave such files out with --skip-undecodable"
        ) from None
