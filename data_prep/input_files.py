"""List the input files of the given paths in a fixed order, and check later that they have not changed.

A file is cut into parts if readers can start inside it. `readers.py` and `tar_reader.py` read the parts.
"""

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import glob as glob_paths
from glob import has_magic
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from tandem.data_prep import formats
from tandem.data_prep.decompression import LONG_WINDOW_ERROR, READ_BLOCK_BYTES
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import NotAFile, check_regular_file, open_regular_file, parse_json
from tandem.trainer.data import remote_files
from tandem.trainer.data.remote_files import RemoteFile

SAMPLE_MANIFEST_FILE = "manifest.jsonl"
"""Lists the tars of a tokenized corpus in the form of open_lm and DCLM: on each line a shard and its number of samples."""
MAX_EXPANDED_PATHS = 1_000_000
"""Largest number of paths that the braces of one path stand for."""
TYPICAL_COMPRESSION_RATIO = 3
"""Approximate number of bytes of text in a compressed byte. It affects only the sizes of units."""
MAX_NAMED_SUFFIXES = 5
"""Largest number of suffixes in the note about files that were left out."""


@dataclass(frozen=True)
class InputFile(RemoteFile):
    """A file. Its `name`, the number of its --input and the path below it, determines the order and the shuffle."""

    num_samples: int | None = None
    """Number of samples of a tar according to its manifest.jsonl, if there is one."""

    format: str = "text"
    """One of FORMATS."""
    compression: str | None = None
    """The compression of the whole file."""

    @property
    def estimated_text_bytes(self) -> int:
        """The approximate size of the file's text."""
        ratio = TYPICAL_COMPRESSION_RATIO if self.compression or self.format == "parquet" else 1
        return self.size_bytes * ratio

    def split_into_parts(self, part_bytes: int) -> list["FilePart"]:
        """Cut the file into parts of about `part_bytes` of text, or into one part if readers cannot start inside it."""
        divisible = self.format in ("jsonl", "parquet") and not self.compression
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


@dataclass
class Listing:
    """What was found beside the files to read, for a note to the user."""

    skips_dangling_links: bool = False
    dangling_links: int = 0
    outside_links: list[str] = field(default_factory=list)
    """Links that lead out of the given folder. They are read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The suffixes of files of folders that are not read, with their numbers."""

    def notes(self) -> Iterator[str]:
        """Yield a line for each kind."""
        if self.dangling_links:
            yield f"--skip-dangling-links: left out {self.dangling_links} links to files that do not exist"
        if self.outside_links:
            yield (
                f"--input: reads {len(self.outside_links)} links that lead out of their folder, "
                f"for example {self.outside_links[0]}"
            )
        if self.left_out:
            kinds = ", ".join(
                f"{suffix or 'no suffix'}: {n}" for suffix, n in self.left_out.most_common(MAX_NAMED_SUFFIXES)
            )
            more = ", ..." if len(self.left_out) > MAX_NAMED_SUFFIXES else ""
            yield (
                f"--input: left out {self.left_out.total()} files of folders, because their names show no format "
                f"({kinds}{more}); give --glob to read such files"
            )


@dataclass(frozen=True)
class _Selection:
    """Which files of a folder to read: those that match the glob, those of the format, or those with a known suffix."""

    glob: str | None
    option: str
    only_tars: bool
    text_field: str
    format: str | None
    listing: Listing

    def wants(self, name: str) -> bool:
        """Return whether to read this file of a folder. Hidden files are never read."""
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return False
        if self.glob:
            return _matches(parts, ("**", *PurePosixPath(self.glob).parts))
        if not self._knows(name):
            self.listing.left_out[PurePosixPath(name).suffix] += 1
            return False
        return True

    def _knows(self, name: str) -> bool:
        named_format, compression = formats.format_of_name(name)
        if self.only_tars:
            return named_format == "tar"
        if self.format is not None:
            return named_format == self.format or (named_format, self.format) == ("json", "jsonl")
        if named_format == "text" and not compression:
            return PurePosixPath(name).suffix in formats.TEXT_SUFFIXES  # not .TXT, which was never read
        return named_format is not None

    def examine(self, file: RemoteFile, is_named: bool) -> formats.FileFormat | None:
        """Return the file's format, or None if it is not to be read: a .json of a folder that holds no records.

        Raises: UserError if a named file has an unknown format. A .json file of records must not become one long text.
        """
        named_format, compression = formats.format_of_name(file.name)
        is_remote = remote_files.is_remote(file.address)
        if self.only_tars and is_named and named_format != "tar":
            raise UserError(
                f"{self.option}: {file.address} is not a webdataset tar, and --tokens reads only those; "
                "name .tar files or a folder"
            )
        is_certain = named_format not in (None, "json") and (is_remote or formats.is_known_without_a_look(file.name))
        if is_certain and named_format is not None and self.format is None:
            return formats.FileFormat(named_format, compression)
        is_plain_json = (named_format, compression) == ("json", None)
        is_json_of_folder = is_plain_json and not is_named and not self.glob and self.format is None
        found: formats.FileFormat | None
        try:
            with remote_files.open_file(file.address) as stream:
                any_text = self.glob is not None or self.format is not None
                found = formats.detect(stream, file.name, self.text_field, any_text=any_text)
        except OSError as error:
            raise unreadable_error(file.address, error) from None
        except formats.UnknownFormat as error:
            if not is_json_of_folder:
                raise UserError(f"{self.option}: {file.address} {error}") from None
            found = None
        if self.format is not None and found is not None:
            return replace(found, format=self.format)
        if is_json_of_folder and not (found and found.has_text):
            self.listing.left_out[PurePosixPath(file.name).suffix] += 1
            return None
        return found


def list_input_files(
    paths: list[str], glob: str | None, output: Path, option: str = "--input", *, only_tars: bool = False,
    text_field: str = "text", file_format: str | None = None, listing: Listing | None = None,
) -> list[InputFile]:  # fmt: skip
    """List every file to read, sorted within each path. A file that is found twice is listed once. Hidden files and files
    in `output` are left out. Braces in a path, and * in a local one, are expanded as in bash. `listing` receives what else
    was found.

    Raises: UserError if a path does not exist or cannot be read, or if there is nothing to read.
    """
    if glob and glob.startswith("/"):
        raise UserError(
            f"--glob: {glob} is an absolute path; use a pattern of names below --input, for example 'src/**/*.py'"
        )
    selection = _Selection(glob, option, only_tars, text_field, file_format, listing or Listing())
    found: dict[str, InputFile] = {}
    expanded = [(path, samples) for given in paths for path, samples in _expand(given, option, only_tars)]
    for number, (path, num_samples) in enumerate(expanded):
        is_remote = remote_files.is_remote(path)
        files = _list_remote(path, selection) if is_remote else _list_local(path, output, selection)
        for identity, file, is_named in files:
            if identity not in found and (kind := selection.examine(file, is_named)):
                name = f"{number}/{file.name}"
                found[identity] = InputFile(
                    name, file.address, file.size_bytes, file.version, num_samples, kind.format, kind.compression
                )
    output_path = output.resolve()
    local_paths = [Path(given).resolve() for given in paths if not remote_files.is_remote(given)]
    if not found and any(output_path in (path, *path.parents) for path in local_paths):
        raise UserError(
            f"{option}: {', '.join(paths)} is inside --output {output}, whose files are not read; name another folder"
        )
    if not found:
        met = ", ".join(f"{suffix or 'no suffix'}: {n}" for suffix, n in selection.listing.left_out.most_common(5))
        rule = f"with a known suffix{met and f' (it has {met})'}; give --glob or another path"
        if ".json" in selection.listing.left_out:
            rule = (
                f"with the field {text_field!r} ({met}); name the field in --text-field, or give --glob or another path"
            )
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
    is_local = not remote_files.is_remote(given_path)
    if is_local and has_magic(given_path) and not os.path.lexists(given_path) and (found := glob_paths(given_path)):
        yield from ((path, None) for path in sorted(found))
        return
    is_literal = "{" not in given_path or (is_local and Path(given_path).exists())
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


def _list_remote(given_path: str, selection: _Selection) -> Iterator[tuple[str, RemoteFile, bool]]:
    for file in remote_files.list_files(given_path):
        if file.address != given_path:
            if selection.wants(file.name):
                yield file.address, file, False
            continue
        # The query of a link to one file is often a signature that changes every day.
        name = unquote(PurePosixPath(urlsplit(given_path).path).name) if given_path.startswith("http") else file.name
        yield file.address, replace(file, name=name), True


def _list_local(given_path: str, output: Path, selection: _Selection) -> Iterator[tuple[str, RemoteFile, bool]]:
    root, output_path = Path(given_path), output.resolve()
    try:
        if not root.exists():
            raise UserError(f"{selection.option}: {given_path} does not exist; name a folder or a file")
        if not root.is_dir():
            yield str(root.resolve()), RemoteFile(root.name, str(root.absolute()), *_size_and_version(root)), True
            return
        real_root = root.resolve()
        for path in sorted(_walk(root, selection)):
            if path.is_symlink() and not path.exists():
                _skip_dangling_link(path, selection)
                continue
            real = path.resolve()
            if output_path in real.parents:
                continue
            if real_root not in real.parents:
                selection.listing.outside_links.append(f"{path} -> {real}")
            name = path.relative_to(root).as_posix()
            yield str(real), RemoteFile(name, str(path.absolute()), *_size_and_version(path)), False
    except NotAFile:
        raise
    except OSError as error:
        raise unreadable_error(str(error.filename or given_path), error) from None


def _skip_dangling_link(path: Path, selection: _Selection) -> None:
    if not selection.listing.skips_dangling_links:
        raise UserError(
            f"{path}: cannot be read (No such file: it is a link to {os.readlink(path)}); restore the file, or leave out such "
            "links with --skip-dangling-links"
        )
    selection.listing.dangling_links += 1


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
            # A dangling link and a pipe are kept, so that they are reported.
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


def unreadable_error(path: str, error: Exception, place: str = "", line_number: int | None = None) -> UserError:
    """Return the error for a file that cannot be read, or not beyond this place or line."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedies = {
        remote_files.FileChanged: "run the same command again",
        remote_files.AccessDenied: "correct the credentials",
        remote_files.RemoteError: "restore the file or the connection to it",
        Exception: "restore or leave out the file",
    }
    remedy = next(words for kind, words in remedies.items() if isinstance(error, kind))
    if LONG_WINDOW_ERROR in reason:
        reason = "it was compressed with a window of more than 128 MiB"
        name = PurePosixPath(path).name
        source, first = (name, "download it and ") if remote_files.is_remote(path) else (path, "")
        command = f"zstd -d --long=31 -c {shlex.quote(source)} | zstd -o {shlex.quote(f'new-{name}')}"
        remedy = f"{first}compress it again: {command}"
    line = "" if line_number is None else f":{line_number}"
    return UserError(f"{path}{line}: cannot be read{place} ({reason}); {remedy}")
