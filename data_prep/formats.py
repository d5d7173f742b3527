"""Decide what a file holds: by its first bytes, and by its name only if they do not show it.

A file whose lines are JSON objects is JSON lines, whatever its name is. Source code and markup are never examined.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from tandem.data_prep.decompression import compression_of, read_head
from tandem.data_prep.json_values import JsonValues, lookup, parse_json

FORMATS = ("text", "jsonl", "json", "parquet", "arrow", "tar")
"""Values of --format. json: one array of records, or records that take several lines."""
HEAD_BYTES = 64 << 10
"""Number of decompressed bytes that are examined."""
_TEXT = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
.rs .go .java .kt .scala .swift .m .cs .fs .js .mjs .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli
.clj .ex .exs .erl .sh .bash .zsh .sql .proto .cmake .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
PLAIN_TEXT_SUFFIXES = (".txt", ".text")
"""Suffixes of text that may also hold records."""
RECORD_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".parquet": "parquet",
    ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".tar": "tar",
}  # fmt: skip
COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
_FOREIGN_MAGIC = {
    b"PK\x03\x04": "a zip archive; unzip it", b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it", b"\x04\x22\x4d\x18": "compressed by lz4; run unlz4",
    b"Obj\x01": "an Avro file; convert it to parquet", b"ORC": "an ORC file; convert it to parquet",
    b"FEA1": "a Feather file of version 1; write it with version 2", b"%PDF-": "a PDF; extract its text",
    b"SQLite format 3": "a SQLite database; export its records as JSON lines",
    b"\x89HDF": "an HDF5 file; convert it to parquet", b"PARE": "an encrypted parquet file; decrypt it",
    b"\x1f\x9d": "compressed by compress; run gunzip", b"\xff\xfe": "UTF-16; run iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; run iconv -f UTF-16 -t UTF-8",
}  # fmt: skip


class UnknownFormat(ValueError):
    """The content is of no format that is read, or could be of several. The message states what it is, and the remedy."""


@dataclass(frozen=True)
class FileFormat:
    format: str
    """One of FORMATS."""
    compression: str | None
    has_text: bool = True
    """Whether the first record has text, or null, in the field of the text; true if this is not known."""


def format_of_name(name: str) -> tuple[str | None, str | None]:
    """Return the format and the compression that the suffixes of a name say."""
    path = PurePosixPath(name.lower())
    if path.suffix == ".tgz":
        return "tar", "gzip"
    compression = COMPRESSION_SUFFIXES.get(path.suffix)
    suffix = PurePosixPath(path.stem).suffix if compression else path.suffix
    return ("text" if suffix in TEXT_SUFFIXES else RECORD_SUFFIXES.get(suffix)), compression


def is_known_without_a_look(name: str) -> bool:
    """Return whether the name alone decides: source code and markup."""
    return PurePosixPath(name).suffix in TEXT_SUFFIXES.difference(PLAIN_TEXT_SUFFIXES)


def detect(stream: BinaryIO, name: str, text_field: str, *, any_text: bool) -> FileFormat:
    """Return what an open file holds. With `any_text`, a file of no known kind is text.

    Raises: UnknownFormat.
    """
    head = stream.read(HEAD_BYTES)
    named_format, named_compression = format_of_name(name)
    compression = compression_of(head)
    if compression is not None:
        stream.seek(0)
        head = read_head(stream, compression, HEAD_BYTES)
        if nested := compression_of(head):
            raise UnknownFormat(f"is compressed twice ({compression} of {nested}); decompress it once")
    is_tar = head[257:262] == b"ustar"
    if not head or (named_compression and not compression and not is_tar and not _json_format(head, None, text_field)):
        return FileFormat(named_format or "text", compression or named_compression)  # the reader reports the damage
    for magic, remedy in _FOREIGN_MAGIC.items():
        if head.startswith(magic) and named_format != "text" and not (any_text and named_format is None):
            raise UnknownFormat(f"is {remedy}")
    if head.startswith(b"PAR1"):
        return _seekable("parquet", compression)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _seekable("arrow", compression)
    if is_tar or named_format == "tar":
        return FileFormat("tar", compression)
    if found := _json_format(head, named_format, text_field):
        return FileFormat(found[0], compression, found[1])
    if named_format in ("parquet", "arrow"):
        return FileFormat(named_format, compression)
    if named_format in ("text", "jsonl") or any_text:
        return FileFormat(named_format if named_format in ("text", "jsonl") else "text", compression, has_text=False)
    what = (
        "does not begin with JSON" if named_format == "json" else "has neither a name nor a content of a known format"
    )
    if PurePosixPath(name).suffix.lower() in (".csv", ".tsv"):
        raise UnknownFormat("is a table of text; convert it to parquet or JSON lines, for example with pandas")
    raise UnknownFormat(f"{what}; give --format, for example --format text to read it as one text")


def _seekable(name: str, compression: str | None) -> FileFormat:
    if compression:
        raise UnknownFormat(f"is a {name} file compressed by {compression}; decompress it, {name} compresses by itself")
    return FileFormat(name, None)


def _json_format(head: bytes, named_format: str | None, text_field: str) -> tuple[str, bool] | None:
    """Return the format of JSON records with this beginning, and whether the first has the text; None if it is not JSON."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith((b"{", b"[")):
        return None
    lines = [line for line in text.split(b"\n") if line.strip()]
    is_long_line = len(lines) == 1 and len(head) >= HEAD_BYTES
    if len(head) >= HEAD_BYTES and len(lines) > 1:
        lines.pop()  # the cut may be inside it
    values = [_parse(line) for line in lines]
    has_text, num_with_text = _has_text(values[0], text_field), sum(_has_text(value, text_field) for value in values)
    consists_of_records = num_with_text > max(1, len(values) // 2)  # and some damaged lines
    if named_format == "text":
        # Text may quote a line of JSON, but not consist of it.
        if consists_of_records or (all(isinstance(value, dict) for value in values) and (len(values) > 1 or has_text)):
            return "jsonl", has_text
        first = next(iter(_values(text)), None) if text.startswith(b"[") else None
        return ("json", True) if _has_text(first, text_field) else None
    if isinstance(values[0], dict) or consists_of_records:
        return "jsonl", has_text or consists_of_records
    if isinstance(values[0], list) and named_format == "jsonl" and not any(isinstance(one, dict) for one in values[0]):
        return "jsonl", False
    if named_format == "jsonl" and is_long_line and text.startswith(b"{"):
        return "jsonl", True
    try:
        first = next(_values(text), {text_field: ""})
    except ValueError:
        return ("jsonl", False) if named_format == "jsonl" else None
    return "json", _has_text(first, text_field)


def _has_text(record: Any, text_field: str) -> bool:
    value = lookup(record, text_field)
    return value is None or isinstance(value, str)


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _values(text: bytes) -> Iterator[Any]:
    """Yield the complete values of a text that may be cut."""
    reader = JsonValues(text.decode(errors="ignore"))
    while (value := reader.next_value()) is not JsonValues.INCOMPLETE:
        yield value
