"""The 256 printable characters that represent bytes in the vocabulary of a byte-level BPE."""

NUM_BYTE_VALUES = 256
_PRINTABLE_BYTES = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_UNPRINTABLE_BYTES = [value for value in range(NUM_BYTE_VALUES) if value not in _PRINTABLE_BYTES]
BYTE_TO_UNICODE = {value: chr(value) for value in _PRINTABLE_BYTES} | {
    value: chr(NUM_BYTE_VALUES + index) for index, value in enumerate(_UNPRINTABLE_BYTES)
}
"""The character of each byte value.  Source: GPT-2's encoder."""


def to_byte_level(token: bytes) -> str:
    return token.decode("latin-1").translate(BYTE_TO_UNICODE)
