"""Helpers that inspect copies of shards."""

from pathlib import Path

GIB = 2.0**30
SHORT_TIMEOUT_SECONDS = 1.0
"""The timeout in tests that wait for it."""
WAIT_TIMEOUT_SECONDS = 30.0
"""How long a test waits for an expected event on a busy machine."""


def shard_url(shard) -> str:
    return f"/a/{shard.file}"


def file_names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {".lock"}


def open_copy_path(cache, folder, shard) -> Path:
    with cache.open_shard(folder, shard) as file:
        return Path(file.name)


def equals_original(path, tmp_path, shard) -> bool:
    return Path(path).read_bytes() == (tmp_path / "a" / shard.file).read_bytes()
