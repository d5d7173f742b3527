"""How the inputs are divided into units of work, by the inputs alone.

The one idea: a unit's name is a hash of the settings and of what it reads, so finished work is found again by whoever
starts next, with however many workers, and work on a file that has changed since is not. No byte of the result depends
on how many workers there are or when they stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tandem.data_prep.input_files import Input, Part

SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 8 << 20, 512 << 20
"""Of text: what is lost by a kill, at most, against the number of files of unfinished work."""
VERSION = 2
"""Of what a unit leaves behind: unfinished work of another version is not taken over."""
UNITS = 64
"""A corpus is cut into about as many units, within the bounds above, so that workers end together."""


@dataclass(frozen=True)
class Unit:
    """Neighbouring parts of the inputs that one worker encodes."""

    name: str
    index: int
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def units(inputs: list[Input], identity: dict[str, Any]) -> list[Unit]:
    """All inputs, each in one unit or, where its format allows it, cut over several."""
    total = sum(file.text_bytes for file in inputs)
    unit_bytes = min(max(total // UNITS, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)
    settings = json.dumps([VERSION, identity], sort_keys=True)
    found: list[Unit] = []
    for parts in _grouped(inputs, unit_bytes):
        keys = [[part.input.name, part.input.bytes, part.input.version, part.number, part.count] for part in parts]
        name = hashlib.sha256(f"{settings}\0{json.dumps(keys)}".encode()).hexdigest()[:24]
        found.append(Unit(name, len(found), tuple(parts)))
    return found


def _grouped(inputs: list[Input], unit_bytes: int) -> Iterator[list[Part]]:
    held: list[Part] = []
    held_bytes = 0
    for file in inputs:
        for part in file.parts(unit_bytes):
            held.append(part)
            held_bytes += file.text_bytes // part.count
            if held_bytes >= unit_bytes:
                yield held
                held, held_bytes = [], 0
    if held:
        yield held
