"""Inputs as documents: which files of the named paths are read, and the text of each document in them, in a
fixed order.

The readers are ours, not datatrove's: its reader takes 165-175 MB/s a core from JSONL where orjson takes 570, and
counts its documents by task, so that another number of tasks is another corpus. pyarrow opens the compressed streams
because it reports a truncated zstd file, which the zstandard package reads as a short one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet

from trainer.config import UserError
from trainer.data import remote

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
.rs .go .java .kt .scala .swift .m .cs .fs .js .mjs .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli
.clj .ex .exs .erl .sh .bash .zsh .sql .proto .cmake .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
RECORD_CODECS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
TYPICAL_COMPRESSION = 3
"""Bytes of text in a byte of a compressed file, about; only the size of units depends on it."""
READ_BYTES = 4 << 20


class Undecodable(UserError):
    """A text file that is not UTF-8."""


@dataclass(frozen=True)
class Input:
    name: str
    """The path below its --input, after that input's number; order and shuffle depend on this alone."""
    address: str
    bytes: int
    version: str
    """Changes when the content does: time of the last change, or the server's tag."""

    @property
    def text_bytes(self) -> int:
        """About how much text the file holds."""
        return self.bytes if self._codec is None and not self._is_parquet else self.bytes * TYPICAL_COMPRESSION

    @property
    def _is_parquet(self) -> bool:
        return self.address.endswith(".parquet")

    @property
    def _codec(self) -> str | None:
        return next((codec for suffix, codec in RECORD_CODECS.items() if self.address.endswith(suffix)), None)

    @property
    def _is_records(self) -> bool:
        return self.address.endswith(tuple(RECORD_CODECS))

    def parts(self, part_bytes: int) -> list[Part]:
        """The whole file, or, where readers can start inside, about `part_bytes` of text each."""
        divisible = self._is_parquet or (self._is_records and self._codec is None)
        count = max(1, self.text_bytes // part_bytes) if divisible else 1
        return [Part(self, number, count) for number in range(count)]


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` of a file: a range of bytes, or of row groups of a parquet file."""

    input: Input
    number: int
    count: int

    @property
    def range(self) -> tuple[int, int]:
        """First byte, and the one behind the last; a line belongs to the part it begins in."""
        whole = self.input.bytes
        return whole * self.number // self.count, whole * (self.number + 1) // self.count

    @property
    def bytes(self) -> int:
        start, end = self.range
        return end - start


@dataclass(frozen=True, slots=True)
class Document:
    place: str
    """The name of its file, and the byte (of the text of the file) or row where a file holds several."""
    text: str
    fields: dict[str, Any]
    """What else its record says."""


Advance = Callable[[int], None]
"""Told how many bytes of the inputs were read since the last call."""


def inputs(paths: list[str], glob: str | None, output: Path) -> list[Input]:
    """Every file to read, sorted within each path; a file reached twice is read once, hidden ones and
    `output` never.

    Raises: UserError for a path that does not exist, or where there is nothing to read.
    """
    found: dict[str, Input] = {}
    for number, given in enumerate(paths):
        for name, address, size, version in _files(given, glob, output):
            found.setdefault(address, Input(f"{number}/{name}", address, size, version))
    if not found:
        pattern = f"--glob {glob}" if glob else "a known suffix"
        raise UserError(f"--input: {', '.join(paths)} has no file with {pattern}; give --glob or another path")
    return list(found.values())


def _files(given: str, glob: str | None, output: Path) -> Iterator[tuple[str, str, int, str]]:
    if remote.is_remote(given):
        for file in remote.files(given):
            if Path(file.name).match(glob) if glob else _is_known(Path(file.name)):
                yield file.name, file.address, file.bytes, file.version
        return
    root = Path(given)
    if not root.exists():
        raise UserError(f"--input: {given} does not exist; name a folder or a file")
    for path in sorted(_below(root, glob)) if root.is_dir() else [root]:
        real = path.resolve()
        if output.resolve() not in real.parents:
            status = path.stat()
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            yield name, str(real), status.st_size, str(status.st_mtime_ns)


def content_hash(part: Part) -> str:
    """SHA-256 of the part's bytes where the file is local, else the version its server gives it."""
    if remote.is_remote(part.input.address):
        return part.input.version
    whole = hashlib.sha256()
    start, end = part.range
    try:
        with open(part.input.address, "rb") as file:
            file.seek(start)
            while start < end and (block := file.read(min(READ_BYTES, end - start))):
                whole.update(block)
                start += len(block)
    except OSError as error:
        raise _unreadable(part.input.address, error) from None
    return whole.hexdigest()


def documents(part: Part, text_field: str, more_fields: list[str], advance: Advance) -> Iterator[Document]:
    """The documents of one part in their order; empty ones too. `more_fields` are wanted besides the text.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    file = part.input
    try:
        with remote.opened(file.address) as opened:
            if file._is_parquet:
                yield from _parquet_rows(part, opened, text_field, more_fields)
                advance(part.bytes)
            elif file._is_records:
                yield from _json_lines(part, opened, text_field, advance)
            else:
                yield Document(file.name, _decoded(opened.read(), file.address), {})
                advance(part.bytes)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise _unreadable(file.address, error) from None


def _json_lines(part: Part, opened: BinaryIO, text_field: str, advance: Advance) -> Iterator[Document]:
    file, (start, end) = part.input, part.range
    codec = file._codec
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
        raise _unreadable(f"{file.address}:{_lines_before(part, start) + number + 1}", error) from None
    advance(max(0, end - told))


def _lines_before(part: Part, start: int) -> int:
    """Lines of a plain file before byte `start`: only asked for when something is wrong."""
    if not start:
        return 0
    with remote.opened(part.input.address) as opened:
        return opened.read(start).count(b"\n")


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
    file, table = part.input, pyarrow.parquet.ParquetFile(opened)
    schema = table.schema_arrow
    columns = [text_field, *(name for name in more_fields if name in schema.names)]
    if text_field not in schema.names:
        known = ", ".join(schema.names)[:200]
        raise UserError(
            f"{file.address}: has no field {text_field!r}; there is {known}; name the text with --text-field"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(
            f"{file.address}: field {text_field!r} is {kind}; must be text; name another with --text-field"
        )
    groups = table.num_row_groups
    first, last = groups * part.number // part.count, groups * (part.number + 1) // part.count
    number = sum(table.metadata.row_group(group).num_rows for group in range(first))
    for batch in table.iter_batches(row_groups=list(range(first, last)), columns=columns):
        for record in batch.to_pylist():
            number += 1
            text = record.pop(text_field)
            if text is None:
                raise UserError(f"{file.address}: row {number} has no {text_field!r}; correct or remove the row")
            yield Document(f"{file.name}:{number}", text, record)


def _decoded(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); "
            "convert it, or leave such files out with --skip-undecodable"
        ) from None


def _below(folder: Path, glob: str | None) -> Iterator[Path]:
    for path in folder.rglob(glob or "*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (glob or _is_known(path)):
            yield path


def _is_known(path: Path) -> bool:
    return path.suffix in TEXT_SUFFIXES or path.suffix == ".parquet" or path.name.endswith(tuple(RECORD_CODECS))


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); restore or leave out the file")
