"""Files that grow by one JSON object a line, and what a kill leaves of the last line.

A record is added in one write to a file without a buffer, so a kill leaves it whole, torn, or not there. The one idea: nobody
takes bytes away. The next process that opens the file ends a torn line, which stays as a line that is no record, and readers
pass over it. So a record whose newline alone was lost still counts, and two processes that append to one file do not harm
each other's lines. A file whose lines are counted is opened with `cut`: there the torn line goes. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

TAIL_CHUNK_BYTES = 1 << 16
"""Read at once on the way from the end of a file to its beginning."""


def open_journal(path: Path, *, cut: bool = False) -> FileIO:
    """The file, made if it is not there, open for `append_record`; a torn last line is ended, or removed if `cut`."""
    torn = next(_reversed_lines(path), b"")
    if torn:
        with path.open("ab", buffering=0) as file:
            if cut:
                file.truncate(file.tell() - len(torn))
            else:
                file.write(b"\n")
            os.fsync(file.fileno())
    return path.open("ab", buffering=0)


def append_record(file: RawIOBase, record: dict[str, Any], *, compact: bool = False, sync: bool = False) -> None:
    """The record is a line at the end of the file that `open_journal` gave, and with `sync` it is on disk.

    Raises: OSError, also where only a part of the line has room. ValueError for a number that is not finite, which JSON lacks.
    """
    line = json.dumps(record, allow_nan=False, separators=(",", ":") if compact else None).encode() + b"\n"
    if file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if sync:
        os.fsync(file.fileno())


def read_records(path: Path, *, strict: bool = False) -> Iterator[dict[str, Any]]:
    """The records of the file in their order, none if there is no file. Lines that are no record are passed over; if `strict`,
    only a torn last line is.

    Raises: ValueError, if `strict`, for another line that is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if strict and line.endswith(b"\n"):
                yield json.loads(line)
            elif found := parse_record(line):
                yield found


def read_records_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The records of the file, the last one first, none if there is no file; only as much is read as is asked for."""
    return filter(None, map(parse_record, _reversed_lines(path)))


def parse_record(line: bytes) -> dict[str, Any]:
    """The record in a line; an empty one if there is none, as in a line that a kill tore."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reversed_lines(path: Path) -> Iterator[bytes]:
    """Without their newlines; the first is what stands behind the last newline."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            end, start = start, max(0, start - TAIL_CHUNK_BYTES)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest
