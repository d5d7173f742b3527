"""What a checkpoint folder holds, as names, and which folders count as committed. Touches no tensor.

    checkpoints/step-00000100/
        rank-00000.safetensors    one per rank that owned something: "<kind>/<name>/<start>" -> flat fp32
        manifest.json             step, cursor, model, fragments with their place, hash and size of every file
        COMMITTED                 hash of manifest.json; written last: without it the folder does not count

A fragment is a run of one rank's box (its tp share of the padded global tensor), so any number of readers can put the true
global tensor together and cut it their own way.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
"""Of the names in the manifest. No other is read: the names of one version mean nothing to another."""
MANIFEST_FILE, COMMIT_MARKER = "manifest.json", "COMMITTED"
REJECTED_MARKER = "REJECTED"
"""Name of the marker once a run has found the folder damaged and gone on from an earlier one: the folder does not count."""
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def fragment_key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def list_committed(root: Path) -> list[Path]:
    """Folders below `root` that carry a commit marker, oldest first."""
    return [folder for folder in list_checkpoints(root) if (folder / COMMIT_MARKER).is_file()]


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, committed, torn by a kill or half removed, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def find_damage(folder: Path, files_to_hash: list[str] | None = None) -> str | None:
    """What is wrong with a committed folder, in words, or None. `files_to_hash` limits whose contents are hashed."""
    read = {}
    for file in (MANIFEST_FILE, COMMIT_MARKER):
        try:
            read[file] = (folder / file).read_bytes()
        except OSError:
            return f"{file} cannot be read"
    text = read[MANIFEST_FILE]
    if hashlib.sha256(text).hexdigest().encode() != read[COMMIT_MARKER].strip():
        return f"{MANIFEST_FILE} is not the one that was committed"
    saved: dict[str, dict[str, Any]] = json.loads(text)["files"]
    for file, entry in saved.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{file} is missing or has another size"
    hashed = [file for file in saved if files_to_hash is None or file in files_to_hash]
    # Hashing leaves the interpreter to others, and one core hashes slower than a disk reads.
    with ThreadPoolExecutor() as pool:
        hashes = {file: pool.submit(file_sha256, folder / file) for file in hashed}
    for file, found in hashes.items():
        try:
            if found.result() != saved[file]["sha256"]:
                return f"{file} has other contents than were saved"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


def list_data_files(folder: Path) -> list[str]:
    """The files a committed folder should have besides manifest and marker; none when its manifest cannot be read."""
    try:
        return sorted(read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError):
        return []


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    return manifest


def file_sha256(path: Path) -> str:
    """Hash of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
