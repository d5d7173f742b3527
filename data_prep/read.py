"""Inputs as documents: which files of the named paths are read, and the text of each document in them, in a
fixed order.

The readers are ours, not datatrove's. Its reader takes 165-175 MB/s a core from JSONL where orjson takes 570,
its resume counts whole tasks and drops documents when the number of tasks changes, and what it adds (filters,
deduplication, cluster executors) is not used here; the seam for it is this module's `documents`. pyarrow
opens the compressed streams because it reports a truncated zstd file, which the zstandard package reads as a
short one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow
import pyarrow.parquet

from trainer.config import UserError

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
.rs .go .java .kt .scala .swift .m .cs .fs .js .mjs .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli
.clj .ex .exs .erl .sh .bash .zsh .sql .proto .cmake .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
RECORD_CODECS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
READ_BYTES = 1 << 20


class Undecodable(UserError):
    """A text file that is not UTF-8."""


@dataclass(frozen=True)
class Input:
    name: str
    """The path below its --input, after that input's number; order and shuffle depend on this alone."""
    path: Path
    bytes: int


@dataclass(frozen=True)
class Document:
    place: str
    """The name of its file, and the line or row where a file holds several."""
    text: str


Advance = Callable[[int], None]
"""Told how many bytes of the inputs were read since the last call."""


def inputs(paths: list[str], glob: str | None, output: Path) -> list[Input]:
    """Every file to read, sorted within each path; a file reached twice is read once, hidden ones and
    `output` never.

    Raises: UserError for a path that does not exist, or where there is nothing to read.
    """
    found: dict[Path, Input] = {}
    for number, given in enumerate(paths):
        root = Path(given)
        if not root.exists():
            raise UserError(f"--input: {given} does not exist; name a folder or a file")
        for path in sorted(_below(root, glob)) if root.is_dir() else [root]:
            real = path.resolve()
            if output.resolve() not in real.parents:
                relative = path.relative_to(root).as_posix() if root.is_dir() else path.name
                found.setdefault(real, Input(f"{number}/{relative}", path, path.stat().st_size))
    if not found:
        pattern = f"--glob {glob}" if glob else "a known suffix"
        raise UserError(f"--input: {', '.join(paths)} has no file with {pattern}; give --glob or another path")
    return list(found.values())


def fingerprint(files: list[Input]) -> str:
    """A hash of the names and contents of all files."""

    def digest(file: Input) -> str:
        try:
            with file.path.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(file.path, error) from None

    whole = hashlib.sha256()
    with ThreadPoolExecutor(4) as threads:
        for file, content in zip(files, threads.map(digest, files), strict=True):
            whole.update(f"{file.name}\0{content}\n".encode())
    return whole.hexdigest()


def documents(file: Input, text_field: str, advance: Advance) -> Iterator[Document]:
    """The documents of one file in their order; empty ones too.

    Raises: UserError naming the file, and line or row, that cannot be read or lacks the text.
    """
    name = file.path.name
    record_suffix = next((suffix for suffix in RECORD_CODECS if name.endswith(suffix)), None)
    try:
        with file.path.open("rb") as opened:
            if file.path.suffix == ".parquet":
                yield from _parquet_rows(file, opened, text_field)
            elif record_suffix is not None:
                yield from _json_lines(file, opened, RECORD_CODECS[record_suffix], text_field, advance)
                return
            else:
                yield Document(file.name, _decoded(opened.read(), file.path))
        advance(file.bytes)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise _unreadable(file.path, error) from None


def _json_lines(
    file: Input, opened: BinaryIO, codec: str | None, text_field: str, advance: Advance
) -> Iterator[Document]:
    lines = io.BufferedReader(pyarrow.CompressedInputStream(opened, codec), READ_BYTES) if codec else opened
    number = seen = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{file.name}:{number}", _text(line, text_field, f"{file.path}:{number}"))
            advance(opened.tell() - seen)
            seen = opened.tell()
    except OSError as error:
        raise _unreadable(f"{file.path}:{number + 1}", error) from None


def _text(line: bytes, text_field: str, where: str) -> str:
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error}); correct or remove the line") from None
    if not isinstance(record, dict) or text_field not in record:
        known = ", ".join(map(str, record))[:200] if isinstance(record, dict) else "no fields"
        raise UserError(f"{where}: has no field {text_field!r}; there is {known}; name the text with --text-field")
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise UserError(f"{where}: field {text_field!r} is {kind}; must be text; name another with --text-field")
    return str(record[text_field])


def _parquet_rows(file: Input, opened: BinaryIO, text_field: str) -> Iterator[Document]:
    table = pyarrow.parquet.ParquetFile(opened)
    if text_field not in table.schema_arrow.names:
        known = ", ".join(table.schema_arrow.names)
        raise UserError(f"{file.path}: has no field {text_field!r}; there is {known}; name the text with --text-field")
    kind = table.schema_arrow.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{file.path}: field {text_field!r} is {kind}; must be text; name another with --text-field")
    number = 0
    for chunk in table.iter_batches(batch_size=1024, columns=[text_field]):
        for text in chunk.column(0).to_pylist():
            number += 1
            if text is None:
                raise UserError(f"{file.path}: row {number} has no {text_field!r}; correct or remove the row")
            yield Document(f"{file.name}:{number}", text)


def _decoded(content: bytes, path: Path) -> str:
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


def _unreadable(path: Path | str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); restore or leave out the file")
