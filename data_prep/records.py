"""Common code of the readers of all formats: documents, JSON records, decompression, and detection of changed files.

pyarrow decompresses, because it reports a truncated zstd file. The zstandard package reads such a file as a shorter one.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson
import pyarrow

from tandem.data_prep.input_files import READ_BLOCK_BYTES, FilePart, check_unchanged, unreadable_error
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

MAX_RECORD_BYTES = 2 << 30
"""Limit of a line, a text file or a member of a tar after decompression: a worker holds it in memory."""


@dataclass(frozen=True, slots=True)
class Document:
    location: str
    """The name of its file, and in a file of several documents also the byte of the line, the row or the member."""
    text: str
    fields: dict[str, Any]
    """The other fields of its record."""


@contextmanager
def open_unchanged(part: FilePart) -> Iterator[BinaryIO]:
    """Open the part's file.  Raises: UserError if it has changed since it was listed, or changes inside the block."""
    check_unchanged(part)
    try:
        with remote_files.open_file(part.file.address) as stream:
            yield stream
    except (UserError, OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        if not isinstance(error, remote_files.RemoteError):
            check_unchanged(part)  # a change explains the error better than the error does
        if isinstance(error, UserError):
            raise
        raise unreadable_error(part.file.address, error) from None
    check_unchanged(part)


def decompress(stream: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return stream
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, compression), READ_BLOCK_BYTES)  # type: ignore[arg-type]


def parse_record(line: bytes, text_field: str) -> dict[str, Any]:
    """Parse a JSON object with text in `text_field`.  Raises: ValueError with the fault and the remedy."""
    record = parse_json(line)
    if not isinstance(record, dict) or text_field not in record:
        known = ", ".join(map(str, record))[:200] if record and isinstance(record, dict) else "none"
        raise ValueError(
            f"has no field {text_field!r} (its fields: {known}); name the field of the text in --text-field"
        )
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise ValueError(f"field {text_field!r} is {kind}, not text; name another with --text-field")
    return record


def parse_json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error}); correct or remove it") from None


def printable(name: str) -> str:
    """Escape newlines, control characters and bytes that are not UTF-8, so that a message is one line."""
    return repr(name)[1:-1]


def describe_decode_error(error: UnicodeDecodeError) -> str:
    return f"{error.reason} at byte {error.start}"
