"""Append-only files with one JSON record per line that survive a kill.

Each record is appended in one unbuffered write, so a kill leaves it complete, torn or absent. The next process that opens the
file ends a torn line with a newline and never deletes it. Readers skip lines that are not records. A record that lost only its
newline therefore still counts, and two processes that append to one file do not damage each other's lines. The exception is a
file whose lines are counted: it is opened with `cut`, which removes a torn last line. Nothing here imports torch.
"""

import errno
import json
import os
from collections.abc import Iterator
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import check_line, open_regular_file, parse_json, read_lines
from tandem.trainer.disk import open_no_follow

TAIL_CHUNK_BYTES = 1 << 16
"""Bytes per read while reading a file backwards."""


def open_journal(path: Path, *, cut: bool = False) -> FileIO:
    """Open or create a file for `append_record`. End a torn last line with a newline, or remove it if `cut` is set."""
    try:
        file = open(path, "ab", buffering=0, opener=open_no_follow)  # noqa: SIM115
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise UserError(f"{path} is a link or a pipe; remove it if you do not know who made it") from None
    if torn := next(_reversed_lines(path), b""):
        if cut:
            file.truncate(file.tell() - len(torn))
        else:
            file.write(b"\n")
        os.fsync(file.fileno())
    return file


def append_record(file: RawIOBase, record: dict[str, Any], *, compact: bool = False, sync: bool = False) -> None:
    """Append the record as one line to a file from `open_journal`, and sync the file if `sync` is set.

    Raises: OSError, also if the disk has room for only a part of the line. ValueError for a number that is not finite, which
    JSON cannot represent.
    """
    line = json.dumps(record, allow_nan=False, separators=(",", ":") if compact else None).encode() + b"\n"
    if file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if sync:
        os.fsync(file.fileno())


def read_records(path: Path, *, strict: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of the file, none if it does not exist. Skip lines that are not records.

    Raises: ValueError if `strict` is set and a line other than a torn last one is not JSON.
    """
    if not path.exists():
        return
    with open_regular_file(path) as file:
        for line in read_lines(file):
            if strict and line.endswith(b"\n"):
                yield parse_json(line)
            elif found := parse_record(line):
                yield found


def read_records_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the file from the last to the first, reading only as much as the caller consumes."""
    return filter(None, map(parse_record, _reversed_lines(path)))


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record in a line, or an empty dict if the line is torn or not a record."""
    try:
        found = parse_json(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reversed_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines backwards without newlines. The first is whatever follows the last newline: a torn line or nothing."""
    if not path.exists():
        return
    with open_regular_file(path) as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            end, start = start, max(0, start - TAIL_CHUNK_BYTES)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            check_line(rest, file.name)
            yield from reversed(lines)
        yield rest
