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

FORMAT = 1
MANIFEST, MARKER = "manifest.json", "COMMITTED"
PASSED_OVER = "PASSED-OVER"
"""Name of the marker once a run has found the folder damaged and gone on from an earlier one: the folder does not count."""
KINDS = ("master", "exp_avg", "exp_avg_sq")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def committed(root: Path) -> list[Path]:
    """Folders below `root` that carry a commit marker, oldest first."""
    return [folder for folder in begun(root) if (folder / MARKER).is_file()]


def begun(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, committed, torn by a kill or half removed, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def damage(folder: Path, files: list[str] | None = None) -> str | None:
    """What is wrong with a committed folder, in words, or None. `files` limits whose contents are hashed."""
    read = {}
    for file in (MANIFEST, MARKER):
        try:
            read[file] = (folder / file).read_bytes()
        except OSError:
            return f"{file} cannot be read"
    text = read[MANIFEST]
    if hashlib.sha256(text).hexdigest().encode() != read[MARKER].strip():
        return f"{MANIFEST} is not the one that was committed"
    saved: dict[str, dict[str, Any]] = json.loads(text)["files"]
    for file, entry in saved.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{file} is missing or has another size"
    hashed = [file for file in saved if files is None or file in files]
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


def data_files(folder: Path) -> list[str]:
    """The files a committed folder should have besides manifest and marker; none when its manifest cannot be read."""
    try:
        return sorted(read_manifest(folder)["files"])
    except (OSError, ValueError, KeyError):
        return []


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def file_sha256(path: Path) -> str:
    """Hash of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
