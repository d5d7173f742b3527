"""Divide the inputs into units of work, by their sizes alone.

A unit's name is a hash of the settings and of the parts of files that it reads. A later run with any number of workers
therefore finds the finished units, except those of files that have changed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tandem.data_prep.input_files import FilePart, InputFile

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 8 << 20, 512 << 20
"""Limits of a unit's text. With small units a kill loses little work; with large units there are fewer files."""
WORK_FORMAT_VERSION = 5
"""Version of the readers and of the format of a unit's files. Units of another version are not reused."""
TARGET_NUM_UNITS = 64
"""Approximate number of units, within the limits above, so that workers finish together."""


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive parts of the inputs, which one worker encodes."""

    name: str
    index: int
    parts: tuple[FilePart, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def plan_units(inputs: list[InputFile], settings_dict: dict[str, Any]) -> list[WorkUnit]:
    """Assign every input to a unit, or to several if readers can start inside it."""
    total = sum(file.estimated_text_bytes for file in inputs)
    unit_bytes = min(max(total // TARGET_NUM_UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    settings = json.dumps([WORK_FORMAT_VERSION, settings_dict], sort_keys=True)
    found: list[WorkUnit] = []
    for parts in _group_parts(inputs, unit_bytes):
        keys = [
            [
                part.file.name,
                part.file.size_bytes,
                part.file.version,
                part.index,
                part.num_parts,
                part.file.format,
                part.file.compression,
            ]
            for part in parts
        ]
        name = hashlib.sha256(f"{settings}\0{json.dumps(keys)}".encode()).hexdigest()[:24]
        found.append(WorkUnit(name, len(found), tuple(parts)))
    return found


def _group_parts(inputs: list[InputFile], unit_bytes: int) -> Iterator[list[FilePart]]:
    group: list[FilePart] = []
    group_bytes = 0
    for file in inputs:
        for part in file.split_into_parts(unit_bytes):
            group.append(part)
            group_bytes += file.estimated_text_bytes // part.num_parts
            if group_bytes >= unit_bytes:
                yield group
                group, group_bytes = [], 0
    if group:
        yield group
