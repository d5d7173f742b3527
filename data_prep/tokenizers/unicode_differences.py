"""Characters that gigatoken and tokenizers classify differently, so that they split text around them differently.

Unicode 15.1 to 17 added them. For gigatoken they are letters and digits, while tokenizers does not know them. The reference
encodes documents that contain such a character. `DIFFERING_RANGES` is the result of a comparison of all code points, which
its test repeats. In UTF-8 all of these characters start with one of three bytes, which most texts do not contain.
"""

from collections.abc import Sequence

import numpy as np

DIFFERING_RANGES = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4),
    (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9),
    (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E),
    (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
"""First and last code point of each range."""
NUM_CODE_POINTS = 0x110000
_IS_DIFFERING = np.zeros(NUM_CODE_POINTS, bool)
for _first, _last in DIFFERING_RANGES:
    _IS_DIFFERING[_first : _last + 1] = True
_FIRST_BYTES = sorted({chr(code).encode()[0] for code in np.flatnonzero(_IS_DIFFERING)})


def find_differing_texts(texts: Sequence[str], utf8: Sequence[bytes]) -> list[int]:
    """Return the indices of texts with such a character. `utf8` are the same texts, encoded."""
    return [
        index
        for index, (text, data) in enumerate(zip(texts, utf8, strict=True))
        if not text.isascii() and any(byte in data for byte in _FIRST_BYTES) and _has_differing_character(text)
    ]


def _has_differing_character(text: str) -> bool:
    return bool(_IS_DIFFERING[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any())
