"""Parse JSON records, and read their fields by path."""

import json
import re
from typing import Any

import orjson

MISSING = object()
"""The value of a field that a record does not have."""
_SPACES = re.compile("[ \t\r\n\ufeff]+")
_NEAR_END_CHARACTERS = 16
"""An error of JSON this close to the end of the text, or in a string that does not end, may be due to the cut."""


def lookup(record: Any, path: str) -> Any:
    """Return the value at a path, or MISSING: the field of exactly this name, else each dot leads into a nested record."""
    if not isinstance(record, dict):
        return MISSING
    if path in record:
        return record[path]
    for end in (index for index, character in enumerate(path) if character == "."):
        if path[:end] in record and (found := lookup(record[path[:end]], path[end + 1 :])) is not MISSING:
            return found
    return MISSING


def parse_json(data: bytes) -> Any:
    """Parse JSON, also what Python writes and orjson refuses: NaN, Infinity, half surrogates, a byte order mark.

    Raises: ValueError with the fault and the remedy.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise ValueError(f"is not JSON ({error}); correct or remove it") from None


class JsonValues:
    """Reads the values of JSON text that arrives in pieces: the elements of one array, or values after each other."""

    INCOMPLETE = object()

    def __init__(self, text: str = ""):
        self._text, self._position, self._is_array, self._decoder = text, 0, False, json.JSONDecoder()
        self._is_started = self._is_ended = self._needs_comma = False

    def feed(self, text: str) -> None:
        """Add the next piece."""
        self._text, self._position = self._text[self._position :] + text, 0

    @property
    def unread_characters(self) -> int:
        """Number of characters after the last complete value."""
        return len(self._text) - self._position

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return not self._text[self._position :].strip() and (not self._is_array or self._is_ended)

    def next_value(self) -> Any:
        """Return the next value, or INCOMPLETE if the text ends before its end.  Raises: ValueError if it is not JSON."""
        while True:
            self._skip_spaces()
            if self._position == len(self._text):
                return self.INCOMPLETE
            character = self._text[self._position]
            if not self._is_started:
                self._is_started, self._is_array = True, character == "["
                self._position += self._is_array
            elif self._is_ended:
                raise ValueError("text follows the end of the array")
            elif self._is_array and character == "]":
                self._is_ended = True
                self._position += 1
            elif self._is_array and self._needs_comma:
                if character != ",":
                    raise ValueError(f"the array has {character!r} instead of a comma between two records")
                self._needs_comma = False
                self._position += 1
            else:
                return self._decode()

    def _skip_spaces(self) -> None:
        if spaces := _SPACES.match(self._text, self._position):
            self._position = spaces.end()

    def _decode(self) -> Any:
        try:
            value, self._position = self._decoder.raw_decode(self._text, self._position)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated string")
            if is_cut or error.pos >= len(self._text.rstrip()) - _NEAR_END_CHARACTERS:
                return self.INCOMPLETE
            raise ValueError(f"{error.msg} at character {error.pos - self._position + 1} of the record") from None
        except RecursionError:
            raise ValueError("lists or objects are nested too deeply") from None
        self._needs_comma = self._is_array
        return value
