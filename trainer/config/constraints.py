"""What the type of a field cannot express, as metadata of `typing.Annotated`: `tokens: Annotated[int, Range(at_least=0)]`.

`parsing.parse_dataclass` checks each of them. This module imports nothing of ours, so that every dataclass can use it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a number may have. A bound that is not given does not limit. No number may be infinite or NaN."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def contains(self, value: int | float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = ((self.at_least, "at least"), (self.above, "above"), (self.at_most, "at most"), (self.below, "below"))
        found = [f"{words} {bound:,}" for bound, words in bounds if bound is not None]
        return f"a finite number {' and '.join(found)}".rstrip()


@dataclass(frozen=True)
class Pattern:
    """A regular expression that a whole text must match, and what it describes, for example "a SHA-256 in hexadecimal"."""

    expression: str
    description: str

    def contains(self, value: str) -> bool:
        return re.fullmatch(self.expression, value, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.description


COUNT = Range(at_least=0)
POSITIVE = Range(at_least=1)
SHA256 = Pattern(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")


@dataclass(frozen=True)
class HomePath:
    """A text that is a path or an address: `~` at its start is the user's home folder, and `~name` that of another user."""

    def expand(self, text: str) -> str | None:
        """Return the path with the home folder, or None if no home folder is known."""
        expanded = os.path.expanduser(text)
        return None if expanded.startswith("~") else expanded


@dataclass(frozen=True)
class SelectedBy:
    """The value of this key selects the dataclass into which a section is converted."""

    key: str
    classes: Mapping[str, Any]
