"""Common code of the readers of all formats: documents, JSON records, bad records, and detection of changed files."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow

from tandem.data_prep.formats import format_of_name
from tandem.data_prep.input_files import FilePart, check_unchanged, unreadable_error
from tandem.data_prep.json_values import MISSING, lookup, parse_json
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files

MAX_RECORD_BYTES = 2 << 30
"""Limit of a member of a tar after decompression: a worker holds it in memory."""
MAX_TEXT_BYTES = 256 << 20
"""Limit of a line or a document. To encode it, gigatoken takes 26 bytes of memory for each of its bytes, tokenizers 160."""
MAX_BAD_RECORD_SAMPLES = 5
BAD_RECORDS_TO_STOP = 10_000
"""From this number of bad records on, their share is checked at each of them, and not only at the end of the part."""
BAD_RECORD_COUNTS = (
    "invalid_json_records", "records_without_text", "records_of_other_type", "undecodable_records", "overlong_records",
)  # fmt: skip
"""Names of the counts of records that --skip-bad-lines left out."""


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


class BadRecord(ValueError):
    """A record that has no text. The message states the fault and the remedy."""

    def __init__(self, count_name: str, message: str):
        super().__init__(message)
        self.count_name = count_name
        """One of BAD_RECORD_COUNTS."""


class BadRecords:
    """Counts the bad records of one part, or refuses the first."""

    def __init__(self, part: FilePart, skip: bool, counts: Counter[str], samples: list[str]):
        self.skip, self._part, self._counts, self._samples = skip, part, counts, samples
        self._num_good = self._num_bad = 0
        self._first = ""

    def add_good(self) -> None:
        """Count a record that was read."""
        self._num_good += 1

    def add(self, error: BadRecord, place: Callable[[], str]) -> None:
        """Count a bad record. `place` returns its line, row or member.  Raises: UserError if it must not be left out."""
        address = self._part.file.address
        if not self.skip:
            is_first = not self._num_good and not self._part.index and self._part.file.format in ("json", "jsonl")
            may_be_text = is_first and format_of_name(self._part.file.name)[0] != "jsonl"
            as_text = ", or read the whole file as one text with --format text" if may_be_text else ""
            raise UserError(
                f"{address}{place()}: {error}, or leave out such records with --skip-bad-lines{as_text}"
            ) from None
        self._num_bad += 1
        self._counts[error.count_name] += 1
        if not self._first or len(self._samples) < MAX_BAD_RECORD_SAMPLES:
            sample = f"{place()}: {error}"
            self._first = self._first or sample
            self._samples.append(f"{self._part.file.name}{sample}")
            del self._samples[MAX_BAD_RECORD_SAMPLES:]
        if self._num_bad >= BAD_RECORDS_TO_STOP:
            self.check_share()

    def check_share(self) -> None:
        """Raises: UserError if more than half of the records are bad, because then the format or the field is wrong."""
        if self._num_bad > self._num_good:
            total = self._num_bad + self._num_good
            raise UserError(
                f"{self._part.file.address}: {self._num_bad:,} of {total:,} records are bad, more than half, so --format or "
                f"--text-field is probably wrong; one is {self._first.removeprefix(':')}"
            )


def record_text(record: Any, text_field: str) -> str:
    """Return the text of a record.  Raises: BadRecord."""
    text = lookup(record, text_field)
    if text is MISSING:
        known = ", ".join(map(str, record))[:200] if record and isinstance(record, dict) else "none"
        raise BadRecord(
            "records_without_text",
            f"has no field {text_field!r} (its fields: {known}); name the field of the text in --text-field",
        )
    if not isinstance(text, str):
        count_name = "records_without_text" if text is None else "records_of_other_type"
        raise BadRecord(
            count_name, f"field {text_field!r} is {type(text).__name__}, not text; name another with --text-field"
        )
    return text


def parse_record(line: bytes, text_field: str) -> tuple[str, dict[str, Any]]:
    """Parse a JSON object with text in `text_field`. Return the text, and the other fields.  Raises: BadRecord."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise BadRecord("invalid_json_records", str(error)) from None
    return split_record(record, text_field)


def split_record(record: Any, text_field: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a parsed record, and its other fields.  Raises: BadRecord."""
    text = record_text(record, text_field)
    check_text(text)
    record.pop(text_field, None)
    return text, record


def check_text(text: str) -> None:
    """Raises: BadRecord if the text is too long, or has half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        if len(text) > MAX_TEXT_BYTES // 4 and (num_bytes := len(text.encode())) > MAX_TEXT_BYTES:
            raise BadRecord(
                "overlong_records", f"its text has {num_bytes:,} bytes, more than {MAX_TEXT_BYTES:,}; split it"
            )
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        fault = f"half a surrogate pair at character {error.start + 1}"
        raise BadRecord("undecodable_records", f"is not JSON of Unicode text ({fault}); correct or remove it") from None


def printable(name: str) -> str:
    """Escape newlines, control characters and bytes that are not UTF-8, so that a message is one line."""
    return repr(name)[1:-1]


def describe_decode_error(error: UnicodeDecodeError) -> str:
    return f"{error.reason} at byte {error.start}"
