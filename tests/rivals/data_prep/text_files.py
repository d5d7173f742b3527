"""Gather real text of this machine into .jsonl.zst files with the fields `text` and `meta`."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow

from tandem.trainer.config import UserError

TEXT_SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt", ".html", ".c", ".h", ".cpp")
FILE_MB = 4
MIN_CHARACTERS = 64


@dataclass(frozen=True)
class TextFiles:
    folder: Path
    names: list[str]
    bytes: list[int]
    """UTF-8 bytes of the texts in each file."""
    documents: list[int]

    def subset(self, mb: float, folder: Path) -> "TextFiles":
        """Link the first files that together hold `mb` MB into a new folder."""
        count, total = 0, 0
        while count < len(self.names) and total < mb * 1e6:
            total += self.bytes[count]
            count += 1
        folder.mkdir()
        for name in self.names[:count]:
            (folder / name).symlink_to((self.folder / name).resolve())
        return TextFiles(folder, self.names[:count], self.bytes[:count], self.documents[:count])

    @property
    def paths(self) -> list[str]:
        return [str(self.folder / name) for name in self.names]


def gather_text(folder: Path, sources: list[Path], mb: float) -> TextFiles:
    """Write texts of `mb` MB, or all there are, to a new folder.

    Raises: UserError if there is no text.
    """
    folder.mkdir()
    files = list(_write_files(folder, _unique_texts(sources), mb))
    if not files:
        named, suffixes = ", ".join(map(str, sources)), " ".join(TEXT_SUFFIXES)
        raise UserError(f"--input: {named} contains no text; name folders with {suffixes} files")
    return TextFiles(folder, *(list(column) for column in zip(*files, strict=True)))


def machine_sources() -> list[Path]:
    """Return the folders of the standard library and the installed packages: code and documentation."""
    return [Path(path) for path in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]


def read_documents(paths: Iterable[str]) -> Iterator[str]:
    """Read the texts of these files in order."""
    for path in paths:
        with pyarrow.input_stream(path, compression="zstd") as stream:
            yield from (orjson.loads(line)["text"] for line in stream.read().splitlines())


def _unique_texts(sources: list[Path]) -> Iterator[tuple[Path, str]]:
    seen: set[bytes] = set()
    for path in (path for source in sources for path in sorted(source.rglob("*"))):
        if path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        content = path.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if len(text) >= MIN_CHARACTERS and digest not in seen:
            seen.add(digest)
            yield path, text


def _write_files(folder: Path, texts: Iterator[tuple[Path, str]], mb: float) -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes and documents of each file."""
    lines: list[bytes] = []
    size, total = 0, 0
    for path, text in texts:
        if total + size >= mb * 1e6:
            break
        lines.append(orjson.dumps({"text": text, "meta": {"path": str(path)}}) + b"\n")
        size += len(text.encode())
        if size >= FILE_MB * 1e6:
            yield _write_file(folder, total, lines), size, len(lines)
            total += size
            lines, size = [], 0
    if lines:
        yield _write_file(folder, total, lines), size, len(lines)


def _write_file(folder: Path, start: int, lines: list[bytes]) -> str:
    name = f"text-{start:012d}.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(folder / name), "zstd") as out:
        out.write(b"".join(lines))
    return name
