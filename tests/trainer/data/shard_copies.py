"""Copies of shards, looked at."""

from pathlib import Path

GIB = 2.0**30
SOON_SECONDS = 1.0
"""The timeout where a test waits for it."""
WAIT_SECONDS = 30.0
"""How long a test waits for what shall happen, on a machine that does other things too."""


def url(shard) -> str:
    return f"/a/{shard.file}"


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {".lock"}


def opened_path(cache, folder, shard) -> Path:
    with cache.opened(folder, shard) as file:
        return Path(file.name)


def is_whole(path, tmp_path, shard) -> bool:
    return Path(path).read_bytes() == (tmp_path / "a" / shard.file).read_bytes()
