"""List the input files of the given paths in a fixed order, and check later that they have not changed.

A file is cut into parts if readers can start inside it. `readers.py` and `tar_reader.py` read the parts.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import NotAFile, check_regular_file, open_regular_file, parse_json
from tandem.trainer.data import remote_files
from tandem.trainer.data.remote_files import RemoteFile

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh
.rs .go .java .kt .scala .swift .m .cs .fs .js .mjs .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli
.clj .ex .exs .erl .sh .bash .zsh .sql .proto .cmake .toml .yaml .yml .ini .cfg
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
TAR_COMPRESSION = {".tar": None, ".tar.gz": "gzip", ".tgz": "gzip"}
RECORD_COMPRESSION = {
    ".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd", ".parquet": None, **TAR_COMPRESSION
}  # fmt: skip
"""Suffixes of files that hold several documents, each with the compression of the whole file."""
SAMPLE_MANIFEST_FILE = "manifest.jsonl"
"""Lists the tars of a tokenized corpus in the form of open_lm and DCLM: on each line a shard and its number of samples."""
MAX_EXPANDED_PATHS = 1_000_000
"""Largest number of paths that the braces of one path stand for."""
TYPICAL_COMPRESSION_RATIO = 3
"""Approximate number of bytes of text in a compressed byte. It affects only the sizes of units."""
READ_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class InputFile(RemoteFile):
    """A file. Its `name`, the number of its --input and the path below it, determines the order, the shuffle and the format."""

    num_samples: int | None = None
    """Number of samples of a tar according to its manifest.jsonl, if there is one."""

    @property
    def suffix(self) -> str:
        """The suffix of a file of several documents; empty for a text file."""
        return max((suffix for suffix in RECORD_COMPRESSION if self.name.endswith(suffix)), key=len, default="")

    @property
    def compression(self) -> str | None:
        """The compression of the whole file."""
        return RECORD_COMPRESSION.get(self.suffix)

    @property
    def estimated_text_bytes(self) -> int:
        """The approximate size of the file's text."""
        ratio = TYPICAL_COMPRESSION_RATIO if self.compression or self.suffix == ".parquet" else 1
        return self.size_bytes * ratio

    def split_into_parts(self, part_bytes: int) -> list["FilePart"]:
        """Cut the file into parts of about `part_bytes` of text, or into one part if readers cannot start inside it."""
        divisible = self.suffix in (".jsonl", ".parquet")
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
        """The half-open range of bytes. A line belongs to the part in which it begins."""
        whole = self.file.size_bytes
        return whole * self.index // self.num_parts, whole * (self.index + 1) // self.num_parts

    @property
    def size_bytes(self) -> int:
        start, end = self.byte_range
        return end - start


@dataclass(frozen=True)
class _Selection:
    """Which files to read: those that match the glob, or those with a known suffix."""

    glob: str | None
    option: str
    only_tars: bool

    def wants(self, name: str) -> bool:
        """Return whether to read this file of a folder. Hidden files are never read."""
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts):
            return False
        return _matches(parts, ("**", *PurePosixPath(self.glob).parts)) if self.glob else self._knows(name)

    def check_named(self, name: str, given_path: str) -> None:
        """Raises: UserError if a named file has an unknown format. A .json file of records must not become one long text."""
        if self._knows(name) or (self.glob and not self.only_tars):
            return
        if self.only_tars:
            raise UserError(
                f"{self.option}: {given_path} is not a webdataset tar, and --tokens reads only those; "
                "name .tar files or a folder"
            )
        records = ", ".join(RECORD_COMPRESSION)
        remedy = "rename it" + (", or give --glob to read it as one text" if self.option == "--input" else "")
        raise UserError(
            f"{self.option}: {given_path} has no known suffix; records are read from {records}, text from .txt; {remedy}"
        )

    def _knows(self, name: str) -> bool:
        if self.only_tars:
            return name.endswith(tuple(TAR_COMPRESSION))
        return PurePosixPath(name).suffix in TEXT_SUFFIXES or name.endswith(tuple(RECORD_COMPRESSION))


def list_input_files(
    paths: list[str], glob: str | None, output: Path, option: str = "--input", *, only_tars: bool = False
) -> list[InputFile]:
    """List every file to read, sorted within each path. A file that is found twice is listed once. Hidden files and files
    in `output` are left out. Braces in a path are expanded as in bash.

    Raises: UserError if a path does not exist or cannot be read, or if there is nothing to read.
    """
    if glob and glob.startswith("/"):
        raise UserError(
            f"--glob: {glob} is an absolute path; use a pattern of names below --input, for example 'src/**/*.py'"
        )
    selection = _Selection(glob, option, only_tars)
    found: dict[str, InputFile] = {}
    expanded = [(path, samples) for given in paths for path, samples in _expand(given, option, only_tars)]
    for number, (path, num_samples) in enumerate(expanded):
        is_remote = remote_files.is_remote(path)
        files = _list_remote(path, selection) if is_remote else _list_local(path, output, selection)
        for identity, file in files:
            name = f"{number}/{file.name}"
            found.setdefault(identity, InputFile(name, file.address, file.size_bytes, file.version, num_samples))
    output_path = output.resolve()
    local_paths = [Path(given).resolve() for given in paths if not remote_files.is_remote(given)]
    if not found and any(output_path in (path, *path.parents) for path in local_paths):
        raise UserError(
            f"{option}: {', '.join(paths)} is inside --output {output}, whose files are not read; name another folder"
        )
    if not found:
        rule = "with a known suffix; give --glob or another path"
        if glob:
            rule = f"that matches --glob {glob}; give another pattern"
        raise UserError(f"{option}: {', '.join(paths)} contains no file {rule}")
    return list(found.values())


def _expand(given_path: str, option: str, only_tars: bool) -> Iterator[tuple[str, int | None]]:
    """Yield the paths that a given path expands to, and the number of samples of each if a manifest states it."""
    if not given_path:
        raise UserError(f"{option}: a path is empty; name a folder or a file, for example . for the current folder")
    if only_tars and PurePosixPath(given_path).name == SAMPLE_MANIFEST_FILE:
        yield from _read_sample_manifest(given_path)
        return
    is_literal = "{" not in given_path or (not remote_files.is_remote(given_path) and Path(given_path).exists())
    try:
        spans = [int(last) - int(first) for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", given_path)]
        is_too_long = not is_literal and any(abs(span) > MAX_EXPANDED_PATHS for span in spans)
        paths = [given_path] if is_literal or is_too_long else braceexpand(given_path, escape=False)
        expanded = list(islice(paths, MAX_EXPANDED_PATHS + 1))
    except ValueError:
        raise UserError(
            f"{option}: {given_path} has unbalanced braces; write them for example as {{000..012}}"
        ) from None
    if is_too_long or len(expanded) > MAX_EXPANDED_PATHS:
        raise UserError(
            f"{option}: {given_path} stands for more than {MAX_EXPANDED_PATHS:,} paths; name a folder instead"
        )
    yield from ((path, None) for path in expanded)


def _read_sample_manifest(path: str) -> Iterator[tuple[str, int | None]]:
    folder = path.rpartition("/")[0] or "."
    try:
        for line in remote_files.read_bytes(path).splitlines():
            if line.strip():
                record = parse_json(line)
                count = record.get("num_sequences")
                if not isinstance(record["shard"], str) or not (count is None or type(count) is int):
                    raise ValueError("shard must be text and num_sequences a whole number")
                yield remote_files.join_address(folder, f"{record['shard']}.tar"), count
    except OSError as error:
        raise unreadable_error(path, error) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: is not a manifest of shards ({error}); every line must be like {{"shard": "NAME", "num_sequences": N}}; '
            "correct it, or name the tars instead"
        ) from None


def _list_remote(given_path: str, selection: _Selection) -> Iterator[tuple[str, RemoteFile]]:
    for file in remote_files.list_files(given_path):
        if file.address != given_path:
            if selection.wants(file.name):
                yield file.address, file
            continue
        # The query of a link to one file is often a signature that changes every day.
        name = unquote(PurePosixPath(urlsplit(given_path).path).name) if given_path.startswith("http") else file.name
        selection.check_named(name, given_path)
        yield file.address, replace(file, name=name)


def _list_local(given_path: str, output: Path, selection: _Selection) -> Iterator[tuple[str, RemoteFile]]:
    root, output_path = Path(given_path), output.resolve()
    try:
        if not root.exists():
            raise UserError(f"{selection.option}: {given_path} does not exist; name a folder or a file")
        if not root.is_dir():
            check_regular_file(root)
            selection.check_named(root.name, given_path)
        for path in sorted(_walk(root, selection)) if root.is_dir() else [root]:
            real = path.resolve()
            if output_path not in real.parents:
                name = path.relative_to(root).as_posix() if root.is_dir() else path.name
                yield str(real), RemoteFile(name, str(path.absolute()), *_size_and_version(path))
    except NotAFile:
        raise
    except OSError as error:
        raise unreadable_error(str(error.filename or given_path), error) from None


def _walk(root: Path, selection: _Selection) -> Iterator[Path]:
    """Yield the files to read. Links to folders are followed, but each folder is read once, because links may form a cycle."""
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        folder_path = Path(folder)
        if (real := folder_path.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (folder_path / name for name in names):
            # A dangling link and a pipe are kept, so that reading their size reports them.
            if selection.wants(path.relative_to(root).as_posix()):
                yield path


def _raise(error: OSError) -> NoReturn:
    raise error


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the path matches. ** matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _size_and_version(path: Path) -> tuple[int, str]:
    status = check_regular_file(path)
    return status.st_size, str(status.st_mtime_ns)


def check_unchanged(part: FilePart) -> None:
    """Raises: UserError if the part's file has changed since it was listed, or cannot be examined."""
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
    """Return the SHA-256 of the part's bytes if the file is local, otherwise its version on the server."""
    if remote_files.is_remote(part.file.address):
        return part.file.version
    digest = hashlib.sha256()
    start, end = part.byte_range
    try:
        with open_regular_file(part.file.address) as file:
            file.seek(start)
            while start < end and (block := file.read(min(READ_BLOCK_BYTES, end - start))):
                digest.update(block)
                start += len(block)
    except OSError as error:
        raise unreadable_error(part.file.address, error) from None
    check_unchanged(part)
    return digest.hexdigest()


def unreadable_error(path: str, error: Exception, place: str = "") -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedies = {
        remote_files.FileChanged: "run the same command again",
        remote_files.AccessDenied: "correct the credentials",
        remote_files.RemoteError: "restore the file or the connection to it",
        Exception: "restore or leave out the file",
    }
    remedy = next(words for kind, words in remedies.items() if isinstance(error, kind))
    return UserError(f"{path}: cannot be read{place} ({reason}); {remedy}")
