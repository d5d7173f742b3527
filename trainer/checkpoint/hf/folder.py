"""Read and write the JSON files of a Hugging Face folder, and write a whole folder atomically."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import parse_json, read_file
from tandem.trainer.disk import sync_folder

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_FILE_PATTERN = r"model-\d{5}-of-\d{5}\.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: UserError if the file does not contain one."""
    try:
        tree = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON file ({error}); add or correct it") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: contains a {type(tree).__name__} instead of a JSON object; correct it")
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(target_folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `target_folder` at the end. After an error it is removed, and the target is unchanged.

    Raises: UserError if `target_folder` cannot be replaced, before anything is written.
    """
    target_folder = target_folder.resolve()
    if os.path.ismount(target_folder) or target_folder == Path.cwd():
        what = "a mount point" if os.path.ismount(target_folder) else "the current folder"
        raise UserError(f"{target_folder}: is {what} and cannot be replaced; name a new folder")
    # The process id shows which folders are stale. Another user cannot guess the rest and make the folder first.
    temporary_name = f".{target_folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    folder, old = (target_folder.with_name(f"{temporary_name}.{state}") for state in ("partial", "old"))
    target_folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target_folder)
    folder.mkdir()
    try:
        yield folder
        if target_folder.exists():
            target_folder.rename(old)
        folder.rename(target_folder)
        sync_folder(target_folder.parent)
    finally:
        if old.exists() and not target_folder.exists():
            old.rename(target_folder)
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _remove_stale(target_folder: Path) -> None:
    """Remove the temporary folders of killed processes. One with our own process id is stale too: containers reuse ids."""
    # If the target is missing, an old folder is the only copy of an earlier output.
    states = "partial|old" if target_folder.exists() else "partial"
    for path in target_folder.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(target_folder.name)}\.(\d+)(\.[0-9a-f]+)?\.({states})", path.name)
        if found and (int(found[1]) == os.getpid() or not _is_running(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # the process may belong to another user
    return True
