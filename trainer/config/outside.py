"""Read files, JSON and names that others wrote: only regular files, of a largest size, and only text that cannot harm.

Every file that a user names or that a folder contains is opened here, because opening a named pipe waits forever and a device
never ends. Every JSON text passes `parse_json`. Text for a terminal or a log passes `escape_control_characters`.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tandem.trainer.config.addresses import hide_secrets
from tandem.trainer.config.sections import UserError

MAX_FILE_BYTES = 512 << 20
"""Largest file that is read whole. A manifest takes 330 bytes a shard; the largest known tokenizer.json takes 35 MB."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of a file of JSON lines. A run's own records take less than 100 KB."""
_FILE_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal obeys or that reorder the text around them, and bytes that are not UTF-8. Not newline and tab."""


class NotAFile(UserError, OSError):
    """A pipe, socket or device, or a file that is too large to be read as a whole."""

    @property
    def strerror(self) -> str:  # type: ignore[override]
        return str(self)


def check_regular_file(path: str | Path) -> os.stat_result:
    """Return the state of a file. Raises: NotAFile if it is a pipe, a socket or a device, OSError if there is none."""
    status = os.stat(path)
    if kind := _FILE_KINDS.get(stat.S_IFMT(status.st_mode)):
        remedy = "copy its content to a file and name that"
        raise NotAFile(f"{path}: is {kind}, but only regular files can be read; {remedy}")
    return status


def open_regular_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading. Raises: NotAFile or another OSError."""
    check_regular_file(path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced since the check
        file.close()
        check_regular_file(path)
        raise NotAFile(f"{path}: was replaced while it was opened; start again")
    return file


def read_file(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a whole regular file of at most `max_bytes`. Raises: NotAFile or another OSError."""
    with open_regular_file(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise file_too_large(path, max_bytes)
        return file.read()


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, with every line end as a newline. Raises: UnicodeDecodeError, NotAFile or another OSError."""
    return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding="utf-8").read()


def read_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """Yield the lines of an open file. Raises: NotAFile if a line is so long that it would fill the memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        check_line(line, file.name)
        yield line


def check_line(line: bytes, path: str) -> None:
    """Raises: NotAFile if a line of the file is longer than any record."""
    if len(line) > MAX_LINE_BYTES:
        raise NotAFile(
            f"{path}: has a line of more than {MAX_LINE_BYTES:,} bytes, which is no record; restore the file"
        )


def file_too_large(path: str | Path, max_bytes: int) -> NotAFile:
    """Return the error for a file that is read as a whole and has more than `max_bytes`."""
    return NotAFile(f"{path}: has more than {max_bytes:,} bytes, so it is not the file that belongs there; restore it")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises: UserError if it is not JSON, NotAFile, or another OSError."""
    try:
        return parse_json(read_file(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); restore it") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises: ValueError, also for two equal keys, a number that is not finite, and too deep nesting."""
    try:
        return json.loads(text, parse_float=_parse_float, parse_constant=_refuse_number, object_pairs_hook=_build_dict)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def escape_control_characters(text: str, *, one_line: bool = False) -> str:
    """Replace each character that could control the terminal by its escape sequence, with `one_line` also newlines.

    Passwords and signatures in addresses are hidden, because a terminal and a log have other readers than a config.
    """
    escaped = _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), hide_secrets(text))
    return escaped.replace("\n", "\\n") if one_line else escaped


def safe_print(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print text that may contain names or texts of others."""
    print(escape_control_characters(text), end=end, flush=flush)


def _build_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that contains a key twice, because readers differ in which of the two values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {repeated[:40]!r} is given twice in one object")
    return found


def _parse_float(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text[:40]} is too large or not finite")
