"""Read documents from parts of files in their order: JSON lines and other JSON, parquet, Arrow, webdataset tars and text.

datatrove's readers are not used: they read 165-175 MB of JSONL per second and core, orjson reads 570, and the number of
datatrove's tasks changes the corpus.
"""

import codecs
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from tandem.data_prep import tar_reader
from tandem.data_prep.decompression import READ_BLOCK_BYTES, compression_of, decompress
from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import FilePart, unreadable_error
from tandem.data_prep.json_values import MISSING, JsonValues, lookup
from tandem.data_prep.records import (
    MAX_TEXT_BYTES,
    BadRecord,
    BadRecords,
    Document,
    check_text,
    describe_decode_error,
    open_unchanged,
    parse_record,
    split_record,
)
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

PARQUET_BATCH_BYTES, MAX_PARQUET_BATCH_ROWS = 8 << 20, 1024
"""Limits of a batch of parquet rows. Rows are limited too, because metadata count a text once even if many rows share it."""
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends a stream of IPC messages. pyarrow reads a stream that was cut between two messages as a shorter one."""


class UndecodableText(UserError):
    """A text file that is not UTF-8."""


def read_documents(
    part: FilePart, text_field: str, extra_fields: list[str], advance: ProgressCallback,
    counts: Counter[str] | None = None, *, skip_bad_records: bool = False, samples: list[str] | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Yield the documents of one part in their order, including empty ones, with the fields at the paths `extra_fields`.
    Call `advance` with the bytes of the file read since the last call. Count the members of tars that are not read, and
    with `skip_bad_records` the records that have no text; `samples` receives some of them.

    Raises: UserError naming the file and the line, row or member that cannot be read or lacks the text.
    """
    file = part.file
    counts = Counter() if counts is None else counts
    bad = BadRecords(part, skip_bad_records, counts, [] if samples is None else samples)
    with open_unchanged(part) as stream:
        _check_content(part, stream, text_field)
        if file.format == "parquet":
            yield from _read_parquet(part, stream, text_field, extra_fields, bad)
        elif file.format == "arrow":
            yield from _read_arrow(part, stream, text_field, extra_fields, bad)
        elif file.format == "jsonl":
            yield from _read_json_lines(part, stream, text_field, advance, bad)
        elif file.format == "json":
            yield from _read_json(part, stream, text_field, bad)
        elif file.format == "tar":
            yield from tar_reader.read_tar(part, stream, text_field, extra_fields, advance, counts, bad)
        else:
            assert file.format == "text", f"no reader for {file.format}"
            yield _read_text(part, stream)
        if file.format not in ("jsonl", "tar"):
            advance(part.size_bytes)
    bad.check_share()


def _check_content(part: FilePart, stream: BinaryIO, text_field: str) -> None:
    """Raises: UserError if a remote file, which was listed by its name, is compressed or binary in another way."""
    file = part.file
    if part.index or not remote_files.is_remote(file.address) or file.format in ("text", "tar"):
        return
    head = stream.peek(8)[:8]  # type: ignore[attr-defined]
    found = compression_of(head) or ("parquet" if head.startswith(b"PAR1") else None)
    if found not in (None, file.compression, file.format):
        raise UserError(f"{file.address}: its content is {found}, which its name does not say; rename it")


def _read_text(part: FilePart, stream: BinaryIO) -> Document:
    file = part.file
    content = decompress(stream, file.compression).read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{file.address}: a text of more than {MAX_TEXT_BYTES:,} bytes is too long; split it")
    try:
        return Document(file.name, content.decode(), {})
    except UnicodeDecodeError as error:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        how = " with iconv -f UTF-16 -t UTF-8" if is_utf16 else ""
        raise UndecodableText(
            f"{file.address}: is not UTF-8 ({describe_decode_error(error)}); convert it{how}, or leave out such files "
            "with --skip-undecodable"
        ) from None


def _read_json(part: FilePart, stream: BinaryIO, text_field: str, bad: BadRecords) -> Iterator[Document]:
    """Read the records of one JSON array, or records after each other, with one record and one block in memory."""
    file, number = part.file, 0
    blocks = decompress(stream, file.compression)
    decode = codecs.getincrementaldecoder("utf-8")().decode
    values, is_last = JsonValues(), False
    while not is_last:
        # A long record is read in ever larger blocks, because its beginning is parsed again with each of them.
        block = blocks.read(max(READ_BLOCK_BYTES // 4, values.unread_characters))
        is_last = not block
        try:
            values.feed(decode(block, is_last))
            while (value := values.next_value()) is not JsonValues.INCOMPLETE:
                number += 1
                try:
                    text, fields = split_record(value, text_field)
                except BadRecord as error:
                    bad.add(error, lambda: f": record {number}")  # noqa: B023
                    continue
                bad.add_good()
                yield Document(f"{file.name}:{number}", text, fields)
        except UserError:  # which is a ValueError
            raise
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.address}: record {number + 1} is not UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{file.address}: record {number + 1} is not JSON ({error}); correct it, or give the right --format"
            ) from None
        if values.unread_characters > MAX_TEXT_BYTES:
            raise UserError(f"{file.address}: record {number + 1} has more than {MAX_TEXT_BYTES:,} bytes; split it")
    if not values.is_complete:
        raise UserError(
            f"{file.address}: record {number + 1} is truncated or is not JSON; restore it, or give the right --format"
        )


def _read_json_lines(
    part: FilePart, stream: BinaryIO, text_field: str, advance: ProgressCallback, bad: BadRecords
) -> Iterator[Document]:
    file, (start, end) = part.file, part.byte_range
    compression = file.compression
    if compression and not file.size_bytes:
        raise OSError("Truncated: a compressed file is not empty even if it contains no lines")
    if start:
        stream.seek(start - 1)
        line, num_skipped = _read_line(stream)
        start += len(line) + num_skipped - 1  # a line belongs to the part in which it begins
    lines = decompress(stream, compression)
    line_start, num_lines, reported_bytes = start, 0, part.byte_range[0]
    try:
        while compression or line_start < end:
            line, num_skipped = _read_line(lines)
            if not line:
                break
            num_lines += 1
            if num_skipped or not line.isspace():
                try:
                    if num_skipped:
                        raise BadRecord(
                            "overlong_records", f"the line has more than {MAX_TEXT_BYTES:,} bytes; split it"
                        )
                    text, fields = parse_record(line, text_field)
                except BadRecord as error:
                    bad.add(error, lambda: f":{_count_lines_before(part, start) + num_lines}")  # noqa: B023
                else:
                    bad.add_good()
                    yield Document(f"{file.name}:{line_start}", text, fields)
            line_start += len(line) + num_skipped
            position_bytes = stream.tell() if compression else line_start
            if position_bytes - reported_bytes >= READ_BLOCK_BYTES:
                advance(position_bytes - reported_bytes)
                reported_bytes = position_bytes
    except OSError as error:
        line_number = _count_lines_before(part, start) + num_lines + 1
        raise unreadable_error(file.address, error, line_number=line_number) from None
    advance(max(0, end - reported_bytes))


def _read_line(stream: BinaryIO) -> tuple[bytes, int]:
    """Return a line. If it is too long, which could fill the memory, return its beginning and the size of the rest."""
    line, num_skipped = stream.readline(MAX_TEXT_BYTES + 1), 0
    if len(line) <= MAX_TEXT_BYTES:
        return line, 0
    line, ending, num_skipped = line[:1], line[-1:], len(line) - 1
    while ending not in (b"", b"\n"):
        piece = stream.readline(READ_BLOCK_BYTES)
        ending, num_skipped = piece[-1:], num_skipped + len(piece)
    return line, num_skipped


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


def _read_parquet(
    part: FilePart, stream: BinaryIO, text_field: str, extra_fields: list[str], bad: BadRecords
) -> Iterator[Document]:
    table = pyarrow.parquet.ParquetFile(stream, buffer_size=PARQUET_BATCH_BYTES, pre_buffer=False)
    columns = _columns(part, table.schema_arrow, text_field, extra_fields)
    groups = table.num_row_groups
    first, last = groups * part.index // part.num_parts, groups * (part.index + 1) // part.num_parts
    row_index = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for group in range(first, last):
        rows = _rows_per_batch(table.metadata.row_group(group), columns)
        for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
            yield from _read_batch(part, batch, row_index, text_field, bad)
            row_index += batch.num_rows


def _read_arrow(
    part: FilePart, stream: BinaryIO, text_field: str, extra_fields: list[str], bad: BadRecords
) -> Iterator[Document]:
    """Read an Arrow IPC file or stream, such as those of Feather and of Hugging Face's datasets."""
    if stream.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(stream)
        batches = (table.get_batch(index) for index in range(table.num_record_batches))
    else:
        size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size_bytes - len(ARROW_STREAM_END)))
        if stream.read() != ARROW_STREAM_END:
            raise UserError(f"{part.file.address}: is truncated; restore or leave out the file")
        stream.seek(0)
        table = batches = pyarrow.ipc.open_stream(stream)
    columns, row_index = _columns(part, table.schema, text_field, extra_fields), 0
    for whole in batches:
        batch = whole.select(columns)
        rows = min(max(1, PARQUET_BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)), MAX_PARQUET_BATCH_ROWS)
        for start in range(0, batch.num_rows, rows):
            yield from _read_batch(part, batch.slice(start, rows), row_index + start, text_field, bad)
        row_index += batch.num_rows


def _columns(part: FilePart, schema: pyarrow.Schema, text_field: str, extra_fields: list[str]) -> list[str]:
    """Return the names of the columns that hold these fields.  Raises: UserError if the text is not in one of text."""
    address, wanted = part.file.address, [text_field, *extra_fields]
    columns = [name for name in schema.names if any(path == name or path.startswith(f"{name}.") for path in wanted)]
    if repeated := next((name for name in columns if schema.names.count(name) > 1), None):
        raise UserError(f"{address}: has {schema.names.count(repeated)} columns named {repeated!r}; rename all but one")
    if (kind := _field_type(schema, text_field)) is None:
        known = ", ".join(schema.names)[:200]
        raise UserError(
            f"{address}: has no field {text_field!r} (its fields: {known}); name the field of the text in --text-field"
        )
    types = pyarrow.types
    values = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(check(values) for check in (*checks, types.is_binary_view)):
        what = "empty in every row" if types.is_null(kind) else f"{kind}, not text"
        raise UserError(f"{address}: field {text_field!r} is {what}; name another with --text-field")
    return columns


def _field_type(fields: Any, path: str) -> pyarrow.DataType | None:
    """Return the type of the field at a path in a schema or in a struct, None if there is none. See `lookup`."""
    names = fields.names
    if path in names:
        return fields.field(names.index(path)).type
    for end in (index for index, character in enumerate(path) if character == "."):
        if path[:end] not in names or not pyarrow.types.is_struct(nested := fields.field(names.index(path[:end])).type):
            continue
        if found := _field_type(nested, path[end + 1 :]):
            return found
    return None


def _read_batch(
    part: FilePart, batch: pyarrow.RecordBatch, row_index: int, text_field: str, bad: BadRecords
) -> Iterator[Document]:
    for record in _to_records(part, batch):
        row_index += 1
        try:
            if isinstance(record, UnicodeDecodeError):
                raise _undecodable(record)
            text = _row_text(record, text_field)
        except BadRecord as error:
            bad.add(error, lambda: f": row {row_index}")  # noqa: B023
            continue
        bad.add_good()
        record.pop(text_field, None)
        yield Document(f"{part.file.name}:{row_index}", text, record)


def _to_records(part: FilePart, batch: pyarrow.RecordBatch) -> list[Any]:
    """Return the rows as records, or as the error of a row that is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for index in range(batch.num_rows) for row in _to_records(part, batch.slice(index, 1))]
    except (ValueError, OverflowError) as error:  # nanoseconds, or a year beyond 9999
        raise unreadable_error(part.file.address, error) from None


def _row_text(record: dict[str, Any], text_field: str) -> str:
    value = lookup(record, text_field)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise _undecodable(error) from None
    if value is MISSING or value is None:
        raise BadRecord("records_without_text", f"has no {text_field!r}; correct or remove the row")
    check_text(value)
    return str(value)


def _undecodable(error: UnicodeDecodeError) -> BadRecord:
    return BadRecord("undecodable_records", f"is not UTF-8 ({describe_decode_error(error)}); correct or remove the row")


def _rows_per_batch(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return min(max(1, PARQUET_BATCH_BYTES * group.num_rows // max(1, size)), MAX_PARQUET_BATCH_ROWS)
