"""Which files the named paths mean, in a fixed order, and whether they still are what they were.

A file is cut into parts where readers can start inside. What is read of a part: `readers.py`.
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
from tandem.trainer.data.remote_files import RemoteFile

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
.rs .go .java .kt .scala .swift .m .cs .fs .js .mjs .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli
.clj .ex .exs .erl .sh .bash .zsh .sql .proto .cmake .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
JSON_LINES_COMPRESSION = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
TYPICAL_COMPRESSION_RATIO = 3
"""Bytes of text in a byte of a compressed file, about; only the size of units depends on it."""
READ_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class InputFile:
    name: str
    """The path below its --input, after that input's number; order, shuffle and the way to read depend on this alone."""
    address: str
    size_bytes: int
    version: str
    """Changes when the content does: time of the last change, or the server's tag."""

    @property
    def estimated_text_bytes(self) -> int:
        """About how much text the file holds."""
        return (
            self.size_bytes
            if self.compression is None and not self.is_parquet
            else self.size_bytes * TYPICAL_COMPRESSION_RATIO
        )

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")

    @property
    def is_json_lines(self) -> bool:
        """Whether it has a JSON record in each line."""
        return self.name.endswith(tuple(JSON_LINES_COMPRESSION))

    @property
    def compression(self) -> str | None:
        """What the lines of records are compressed with."""
        return next((codec for suffix, codec in JSON_LINES_COMPRESSION.items() if self.name.endswith(suffix)), None)

    def split_into_parts(self, part_bytes: int) -> list[FilePart]:
        """The whole file, or, where readers can start inside, about `part_bytes` of text each."""
        divisible = self.is_parquet or (self.is_json_lines and self.compression is None)
        count = max(1, self.estimated_text_bytes // part_bytes) if divisible else 1
        return [FilePart(self, number, count) for number in range(count)]


@dataclass(frozen=True)
class FilePart:
    """Part `index` of `num_parts` of a file: a range of bytes, or of row groups of a parquet file."""

    file: InputFile
    index: int
    num_parts: int

    @property
    def byte_range(self) -> tuple[int, int]:
        """First byte, and the one behind the last; a line belongs to the part it begins in."""
        whole = self.file.size_bytes
        return whole * self.index // self.num_parts, whole * (self.index + 1) // self.num_parts

    @property
    def size_bytes(self) -> int:
        start, end = self.byte_range
        return end - start


def list_input_files(paths: list[str], glob: str | None, output: Path, option: str = "--input") -> list[InputFile]:
    """Every file to read, sorted within each path; a file reached twice is read once, hidden ones and
    `output` never. `option` is what the user calls the paths.

    Raises: UserError for a path that does not exist or cannot be read, or where there is nothing to read.
    """
    if glob and glob.startswith("/"):
        raise UserError(f"--glob: {glob}; must be a pattern of names below --input; for example 'src/**/*.py'")
    found: dict[str, InputFile] = {}
    for number, given_path in enumerate(paths):
        if not given_path:
            raise UserError(
                f"{option}: an empty path; must name a folder or a file; leave it out, or write . for this one"
            )
        files = (
            _list_remote(given_path, glob, option)
            if remote_files.is_remote(given_path)
            else _list_local(given_path, glob, output, option)
        )
        for identity, file in files:
            found.setdefault(identity, InputFile(f"{number}/{file.name}", file.address, file.size_bytes, file.version))
    output_path = output.resolve()
    local_paths = [Path(given).resolve() for given in paths if not remote_files.is_remote(given)]
    if not found and any(output_path in (path, *path.parents) for path in local_paths):
        raise UserError(f"{option}: {', '.join(paths)} lies in --output {output}; its files are not read; name another")
    if not found:
        remedy = f"--glob {glob}; give another" if glob else "a known suffix; give --glob or another path"
        raise UserError(f"{option}: {', '.join(paths)} has no file with {remedy}")
    return list(found.values())


def _list_remote(given_path: str, glob: str | None, option: str) -> Iterator[tuple[str, RemoteFile]]:
    for file in remote_files.list_files(given_path):
        if file.address != given_path:
            if _is_wanted(file.name, glob):
                yield file.address, file
            continue
        # What follows the path of a link to one file is often a signature, which is another one every day.
        name = unquote(PurePosixPath(urlsplit(given_path).path).name) if given_path.startswith("http") else file.name
        _check_suffix(name, given_path, glob, option)
        yield file.address, replace(file, name=name)


def _list_local(given_path: str, glob: str | None, output: Path, option: str) -> Iterator[tuple[str, RemoteFile]]:
    root, output_path = Path(given_path), output.resolve()
    try:
        if not root.exists():
            raise UserError(f"{option}: {given_path} does not exist; name a folder or a file")
        if not root.is_dir():
            _check_suffix(root.name, given_path, glob, option)
        for path in sorted(_walk(root, glob)) if root.is_dir() else [root]:
            real = path.resolve()
            if output_path not in real.parents:
                name = path.relative_to(root).as_posix() if root.is_dir() else path.name
                yield str(real), RemoteFile(name, str(path.absolute()), *_size_and_version(path))
    except OSError as error:
        raise unreadable_error(str(error.filename or given_path), error) from None


def _walk(root: Path, glob: str | None) -> Iterator[Path]:
    """The wanted files; folders behind links too, each once, because a link may lead back up."""
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        folder_path = Path(folder)
        if (real := folder_path.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (folder_path / name for name in names):
            # A link to nothing is a file that is missing, and says so when it is looked at.
            if _is_wanted(path.relative_to(root).as_posix(), glob) and (path.is_file() or not path.exists()):
                yield path


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_wanted(name: str, glob: str | None) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):
        return False
    return _matches(parts, ("**", *PurePosixPath(glob).parts)) if glob else _has_known_suffix(name)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the path fits; ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _has_known_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix in TEXT_SUFFIXES or name.endswith((".parquet", *JSON_LINES_COMPRESSION))


def _check_suffix(name: str, given_path: str, glob: str | None, option: str) -> None:
    """Records must not become one long text because their file is called .json."""
    if not glob and not _has_known_suffix(name):
        records = ", ".join((*JSON_LINES_COMPRESSION, ".parquet"))
        remedy = "rename it, or give --glob to read it as one text" if option == "--input" else "rename it"
        raise UserError(f"{option}: {given_path} has no known suffix; records are in {records}, text in .txt; {remedy}")


def _size_and_version(path: Path) -> tuple[int, str]:
    status = path.stat()
    return status.st_size, str(status.st_mtime_ns)


def check_unchanged(part: FilePart) -> None:
    """Raises: UserError where the part's file is not the one any more that was listed, or cannot be looked at."""
    file = part.file
    if remote_files.is_remote(file.address):
        current = [(found.size_bytes, found.version) for found in remote_files.list_files(file.address)]
    else:
        try:
            current = [_size_and_version(Path(file.address))]
        except OSError as error:
            raise unreadable_error(file.address, error) from None
    if current != [(file.size_bytes, file.version)]:
        raise UserError(f"{file.address}: has changed since it was listed; run the same command again")


def content_hash(part: FilePart) -> str:
    """SHA-256 of the part's bytes where the file is local, else the version its server gives it."""
    if remote_files.is_remote(part.file.address):
        return part.file.version
    digest = hashlib.sha256()
    start, end = part.byte_range
    try:
        with open(part.file.address, "rb") as file:
            file.seek(start)
            while start < end and (block := file.read(min(READ_BLOCK_BYTES, end - start))):
                digest.update(block)
                start += len(block)
    except OSError as error:
        raise unreadable_error(part.file.address, error) from None
    check_unchanged(part)
    return digest.hexdigest()


def unreadable_error(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); restore or leave out the file")
