"""Which files the named paths mean, in a fixed order, and whether they still are what they were.

A file is cut into parts where readers can start inside. What is read of a part: `read.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files
from tandem.trainer.data.remote_files import File

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


@dataclass(frozen=True)
class Input:
    name: str
    """The path below its --input, after that input's number; order, shuffle and the way to read depend on this alone."""
    address: str
    bytes: int
    version: str
    """Changes when the content does: time of the last change, or the server's tag."""

    @property
    def text_bytes(self) -> int:
        """About how much text the file holds."""
        return self.bytes if self.codec is None and not self.is_parquet else self.bytes * TYPICAL_COMPRESSION

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")

    @property
    def is_records(self) -> bool:
        """Whether it has a JSON record in each line."""
        return self.name.endswith(tuple(RECORD_CODECS))

    @property
    def codec(self) -> str | None:
        """What the lines of records are compressed with."""
        return next((codec for suffix, codec in RECORD_CODECS.items() if self.name.endswith(suffix)), None)

    def parts(self, part_bytes: int) -> list[Part]:
        """The whole file, or, where readers can start inside, about `part_bytes` of text each."""
        divisible = self.is_parquet or (self.is_records and self.codec is None)
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


def listed(paths: list[str], glob: str | None, output: Path, option: str = "--input") -> list[Input]:
    """Every file to read, sorted within each path; a file reached twice is read once, hidden ones and
    `output` never. `option` is what the user calls the paths.

    Raises: UserError for a path that does not exist or cannot be read, or where there is nothing to read.
    """
    if glob and glob.startswith("/"):
        raise UserError(f"--glob: {glob}; must be a pattern of names below --input; for example 'src/**/*.py'")
    found: dict[str, Input] = {}
    for number, given in enumerate(paths):
        if not given:
            raise UserError(
                f"{option}: an empty path; must name a folder or a file; leave it out, or write . for this one"
            )
        files = _elsewhere(given, glob, option) if remote_files.is_remote(given) else _here(given, glob, output, option)
        for identity, file in files:
            found.setdefault(identity, Input(f"{number}/{file.name}", file.address, file.bytes, file.version))
    made = output.resolve()
    here = [Path(given).resolve() for given in paths if not remote_files.is_remote(given)]
    if not found and any(made in (path, *path.parents) for path in here):
        raise UserError(f"{option}: {', '.join(paths)} lies in --output {output}; its files are not read; name another")
    if not found:
        remedy = f"--glob {glob}; give another" if glob else "a known suffix; give --glob or another path"
        raise UserError(f"{option}: {', '.join(paths)} has no file with {remedy}")
    return list(found.values())


def _elsewhere(given: str, glob: str | None, option: str) -> Iterator[tuple[str, File]]:
    for file in remote_files.files(given):
        if file.address != given:
            if _is_wanted(file.name, glob):
                yield file.address, file
            continue
        # What follows the path of a link to one file is often a signature, which is another one every day.
        name = unquote(PurePosixPath(urlsplit(given).path).name) if given.startswith("http") else file.name
        _check_suffix(name, given, glob, option)
        yield file.address, replace(file, name=name)


def _here(given: str, glob: str | None, output: Path, option: str) -> Iterator[tuple[str, File]]:
    root, made = Path(given), output.resolve()
    try:
        if not root.exists():
            raise UserError(f"{option}: {given} does not exist; name a folder or a file")
        if not root.is_dir():
            _check_suffix(root.name, given, glob, option)
        for path in sorted(_below(root, glob)) if root.is_dir() else [root]:
            real = path.resolve()
            if made not in real.parents:
                name = path.relative_to(root).as_posix() if root.is_dir() else path.name
                yield str(real), File(name, str(path.absolute()), *_size_and_version(path))
    except OSError as error:
        raise unreadable(str(error.filename or given), error) from None


def _below(root: Path, glob: str | None) -> Iterator[Path]:
    """The wanted files; folders behind links too, each once, because a link may lead back up."""
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        here = Path(folder)
        if (real := here.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (here / name for name in names):
            # A link to nothing is a file that is missing, and says so when it is looked at.
            if _is_wanted(path.relative_to(root).as_posix(), glob) and (path.is_file() or not path.exists()):
                yield path


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_wanted(name: str, glob: str | None) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return _matches(parts, ("**", *PurePosixPath(glob).parts)) if glob else _is_known(name)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the path fits; ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_known(name: str) -> bool:
    return PurePosixPath(name).suffix in TEXT_SUFFIXES or name.endswith((".parquet", *RECORD_CODECS))


def _check_suffix(name: str, given: str, glob: str | None, option: str) -> None:
    """Records must not become one long text because their file is called .json."""
    if not glob and not _is_known(name):
        records = ", ".join((*RECORD_CODECS, ".parquet"))
        remedy = "rename it, or give --glob to read it as one text" if option == "--input" else "rename it"
        raise UserError(f"{option}: {given} has no known suffix; records are in {records}, text in .txt; {remedy}")


def _size_and_version(path: Path) -> tuple[int, str]:
    status = path.stat()
    return status.st_size, str(status.st_mtime_ns)


def check_unchanged(part: Part) -> None:
    """Raises: UserError where the part's file is not the one any more that was listed, or cannot be looked at."""
    file = part.input
    if remote_files.is_remote(file.address):
        now = [(found.bytes, found.version) for found in remote_files.files(file.address)]
    else:
        try:
            now = [_size_and_version(Path(file.address))]
        except OSError as error:
            raise unreadable(file.address, error) from None
    if now != [(file.bytes, file.version)]:
        raise UserError(f"{file.address}: has changed since it was listed; run the same command again")


def content_hash(part: Part) -> str:
    """SHA-256 of the part's bytes where the file is local, else the version its server gives it."""
    if remote_files.is_remote(part.input.address):
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
        raise unreadable(part.input.address, error) from None
    check_unchanged(part)
    return whole.hexdigest()


def unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); restore or leave out the file")
