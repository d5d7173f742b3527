"""The layout of a checkpoint folder: its files, whether it is committed, and whether it is damaged. No tensor is read here.

    checkpoints/step-00000100/
        rank-00000.safetensors    one per rank that owns state: "<kind>/<name>/<start>" -> flat fp32
        manifest.json             step, cursor, model, position of every fragment, size and hash of every file
        COMMITTED                 hash of manifest.json, written last; a folder without it is not a checkpoint

A fragment is a contiguous range of one rank's flattened and padded tensor-parallel shard. Any number of ranks can therefore
assemble the global tensor and shard it for their own layout.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tandem.trainer.config.outside import open_regular_file, parse_json, read_file, read_json

FORMAT_VERSION = 2
"""Version of the manifest's format. Only this version can be read."""
MANIFEST_FILE, COMMIT_MARKER = "manifest.json", "COMMITTED"
REJECTED_MARKER = "REJECTED"
"""When a run continues from an older checkpoint, it renames the commit markers of damaged newer ones to this."""
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def fragment_key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def list_committed(root: Path) -> list[Path]:
    """List the committed checkpoint folders in `root`, oldest first."""
    return [folder for folder in list_checkpoints(root) if (folder / COMMIT_MARKER).is_file()]


def list_checkpoints(root: Path) -> list[Path]:
    """List all checkpoint folders in `root`, including incomplete ones, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def find_damage(folder: Path, files_to_hash: list[str] | None = None) -> str | None:
    """Return a description of a committed folder's damage, or None if it has none. Hash only `files_to_hash` if given."""
    read = {}
    for file in (MANIFEST_FILE, COMMIT_MARKER):
        try:
            read[file] = read_file(folder / file)
        except OSError:
            return f"{file} cannot be read"
    text = read[MANIFEST_FILE]
    if hashlib.sha256(text).hexdigest().encode() != read[COMMIT_MARKER].strip():
        return f"{MANIFEST_FILE} is not the one that was committed"
    saved: dict[str, dict[str, Any]] = parse_json(text)["files"]
    for file, entry in saved.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{file} is missing or has another size"
    hashed = [file for file in saved if files_to_hash is None or file in files_to_hash]
    # Threads help: hashing releases the interpreter lock, and one core hashes more slowly than a disk reads.
    with ThreadPoolExecutor() as pool:
        hashes = {file: pool.submit(file_sha256, folder / file) for file in hashed}
    for file, found in hashes.items():
        try:
            if found.result() != saved[file]["sha256"]:
                return f"{file} has changed since it was saved"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


def list_data_files(folder: Path) -> list[str]:
    """List the files of a committed folder except manifest and marker, or no files if the manifest cannot be read."""
    try:
        return sorted(read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError):
        return []


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    return manifest


def file_sha256(path: Path) -> str:
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
