"""How bytes are written in the vocabulary of a byte-level BPE: one printable character for each of the 256."""

from __future__ import annotations

BYTE_VALUES = 256
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHERS = [value for value in range(BYTE_VALUES) if value not in _PRINTABLE]
CHARACTERS = {value: chr(value) for value in _PRINTABLE} | {
    value: chr(BYTE_VALUES + index) for index, value in enumerate(_OTHERS)
}
"""The character of each byte value.  Source: GPT-2's encoder, whose vocabulary files are written in it."""


def written(token: bytes) -> str:
    return token.decode("latin-1").translate(CHARACTERS)
