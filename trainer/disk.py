"""Atomic, durable writes: a file appears complete or not at all, and survives a power cut."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
"""Suffix of a file that is being written."""
TEMPORARY_PATTERN = f"*.{'[0-9a-f]' * 8}{TEMPORARY_SUFFIX}"
"""Matches only such files, so that a cleanup removes the leftovers of killed processes but no files of other programs."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file. If the block succeeds, sync the file and rename it to `path`. If it raises, delete the file."""
    # A scheduler that loses contact with a task may start it again elsewhere. The random name keeps the two writers apart.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace the file's content. After an error the file still has its old content."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def open_no_follow(path: str | Path, flags: int) -> int:
    """Open a file, as the `opener` of `open`, but no link or pipe that another user may have put in its place."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
