"""inputs.json: the name, size, version and hashes of the parts of every file that a corpus was made from.

Versions are times and tags, which differ between copies of the same files. Therefore the manifest contains a hash of
everything except the versions, and inputs.json contains a hash of all its entries.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tandem.data_prep.spill import UnitRecord
from tandem.data_prep.work_units import WorkUnit
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import parse_json
from tandem.trainer.data import manifest, remote_files

MAX_INPUTS_BYTES = 2 << 30
"""Largest inputs.json: about ten million files."""
InputEntry = Sequence[Any]
"""Name, bytes, version, hashes of the parts."""


def list_entries(units: Sequence[WorkUnit], records: Sequence[UnitRecord]) -> list[InputEntry]:
    """Return the entry of each file that these units have read, in order. Each unit has its record."""
    read_parts = [part for unit in units for part in unit.parts]
    hashes = [part_hash for record in records for part_hash in record.part_hashes.split("\n")]
    by_file = groupby(zip(read_parts, hashes, strict=True), key=lambda pair: pair[0].file)
    return [[file.name, file.size_bytes, file.version, [one for _, one in pairs]] for file, pairs in by_file]


def dump(files: Sequence[InputEntry]) -> str:
    """Return the text of inputs.json."""
    return json.dumps({"sha256": _hash(files), "files": files}) + "\n"


def load(path: str | Path) -> list[InputEntry]:
    """Read the entries of inputs.json.  Raises: UserError if any byte has changed since it was written."""
    try:
        text = remote_files.read_bytes(path, max_bytes=MAX_INPUTS_BYTES).decode()
        files: list[InputEntry] = parse_json(text)["files"]
        if dump(files) == text:
            return files
        reason = "content does not match its hash"
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = manifest.one_line(error)
    raise UserError(f"{path}: is missing or damaged ({reason}); restore it or prepare the corpus again")


def summarize(files: Sequence[InputEntry]) -> dict[str, Any]:
    """Return the entries of the manifest about these files."""
    content = [[name, size, hashes] for name, size, _, hashes in files]
    return {"num_input_files": len(files), "inputs_sha256": _hash(content)}


def _hash(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
