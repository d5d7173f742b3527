"""Read documents from parts of files in their order: JSON lines, parquet, webdataset tars and text.

datatrove's readers are not used: they read 165-175 MB of JSONL per second and core, orjson reads 570, and the number of
datatrove's tasks changes the corpus.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from tandem.data_prep import tar_reader
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import READ_BLOCK_BYTES, TAR_COMPRESSION, FilePart, unreadable_error
from tandem.data_prep.records import (
    MAX_RECORD_BYTES,
    Document,
    decompress,
    describe_decode_error,
    open_unchanged,
    parse_record,
)
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

PARQUET_BATCH_BYTES, MAX_PARQUET_BATCH_ROWS = 8 << 20, 1024
"""Limits of a batch of parquet rows. Rows are limited too, because metadata count a text once even if many rows share it."""


class UndecodableText(UserError):
    """A text file that is not UTF-8."""


def read_documents(
    part: FilePart, text_field: str, extra_fields: list[str], advance: ProgressCallback,
    counts: Counter[str] | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Yield the documents of one part in their order, including empty ones, with the fields `extra_fields`. Call
    `advance` with the bytes of the file read since the last call. Count the members of tars that are not read.

    Raises: UserError naming the file and the line, row or member that cannot be read or lacks the text.
    """
    file = part.file
    with open_unchanged(part) as stream:
        if file.suffix == ".parquet":
            yield from _read_parquet(part, stream, text_field, extra_fields)
            advance(part.size_bytes)
        elif file.suffix.startswith(".jsonl"):
            yield from _read_json_lines(part, stream, text_field, advance)
        elif file.suffix in TAR_COMPRESSION:
            counts = Counter() if counts is None else counts
            yield from tar_reader.read_tar(part, stream, text_field, extra_fields, advance, counts)
        else:
            assert not file.suffix, f"no reader for {file.suffix}"
            if file.size_bytes > MAX_RECORD_BYTES:
                raise UserError(f"{file.address}: a text of more than {MAX_RECORD_BYTES:,} bytes is too long; split it")
            try:
                yield Document(file.name, stream.read().decode(), {})
            except UnicodeDecodeError as error:
                raise UndecodableText(
                    f"{file.address}: is not UTF-8 ({describe_decode_error(error)}); convert it, or leave out such files "
                    "with --skip-undecodable"
                ) from None
            advance(part.size_bytes)


def _read_json_lines(
    part: FilePart, stream: BinaryIO, text_field: str, advance: ProgressCallback
) -> Iterator[Document]:
    file, (start, end) = part.file, part.byte_range
    compression = file.compression
    if compression and not file.size_bytes:
        raise OSError("Truncated: a compressed file is not empty even if it contains no lines")
    if start:
        stream.seek(start - 1)
        start += len(_read_line(stream)) - 1  # a line belongs to the part in which it begins
    lines = decompress(stream, compression)
    line_start, num_lines, reported_bytes = start, 0, part.byte_range[0]
    try:
        for line in iter(partial(_read_line, lines), b""):
            if not compression and line_start >= end:
                break
            num_lines += 1
            if not line.isspace():
                try:
                    record = parse_record(line, text_field)
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


def _read_line(stream: BinaryIO) -> bytes:
    """Read a line, whose decompression could otherwise fill the memory. Raises: OSError if it is too long."""
    line = stream.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        raise OSError(f"the line has more than {MAX_RECORD_BYTES:,} bytes")
    return line


def _count_lines_before(part: FilePart, start: int) -> int:
    """Count the lines of an uncompressed file before byte `start`, for an error message."""
    if not start:
        return 0
    count = 0
    with remote_files.open_file(part.file.address) as stream:
        while start and (block := stream.read(min(READ_BLOCK_BYTES, start))):
            count += block.count(b"\n")
            start -= len(block)
    return count


def _read_parquet(part: FilePart, stream: BinaryIO, text_field: str, extra_fields: list[str]) -> Iterator[Document]:
    file = part.file
    table = pyarrow.parquet.ParquetFile(stream, buffer_size=PARQUET_BATCH_BYTES, pre_buffer=False)
    schema = table.schema_arrow
    columns = [text_field, *(name for name in extra_fields if name in schema.names)]
    if text_field not in schema.names:
        known = ", ".join(schema.names)[:200]
        raise UserError(
            f"{file.address}: has no field {text_field!r} (its fields: {known}); name the field of the text in --text-field"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file.address}: field {text_field!r} is {kind}, not text; name another with --text-field")
    groups = table.num_row_groups
    first, last = groups * part.index // part.num_parts, groups * (part.index + 1) // part.num_parts
    row_index = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for group in range(first, last):
        rows = _rows_per_batch(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
            try:
                records = batch.to_pylist()
            except (ValueError, OverflowError) as error:  # nanoseconds, or a year beyond 9999
                raise unreadable_error(file.address, error) from None
            for record in records:
                row_index += 1
                text = record.pop(text_field)
                if text is None:
                    raise UserError(f"{file.address}: row {row_index} has no {text_field!r}; correct or remove the row")
                yield Document(f"{file.name}:{row_index}", text, record)


def _rows_per_batch(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return min(max(1, PARQUET_BATCH_BYTES * group.num_rows // max(1, size)), MAX_PARQUET_BATCH_ROWS)
