"""What is on disk stays there: files that appear whole or not at all, and folders that keep their names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that is being written."""
TEMPORARY_PATTERN = f"*.{'[0-9a-f]' * 8}{TEMPORARY_SUFFIX}"
"""Pattern of such names: what a kill has left may be removed, another program's files may not."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends without error, its content then on disk; else nothing is left."""
    # A scheduler that has lost sight of a task starts it again elsewhere: both write, and neither into the other's file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """The file holds all of the content, on disk; or, after an error, what it held before."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
