"""Texts that tokenizers may encode differently: separators, unusual bytes, and code points from all of Unicode.

The texts are small, because the slow library encodes all of them at the start of every preparation, in a fraction of a
second.
"""

from collections.abc import Iterator, Sequence

from tandem.data_prep.tokenizers.unicode_differences import NUM_CODE_POINTS

SURROGATES = range(0xD800, 0xE000)
CODE_POINT_STEP = 127
"""One code point in this many is tried. A prime step varies the position within blocks. Unicode adds longer ranges."""
MAX_SAMPLE_CHARACTERS = 1 << 18
MAX_EXCERPT_CHARACTERS = 1 << 14

_SPACE_CHARACTERS = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
_FRAGMENTS = (
    "", " ", "\0", "\x01\x02", "\x7f", "a", "A1", "12345678901234567890", "½²٣४五Ⅷ", "'", "''s",
    "don't DON'T 'S '\u017f 'LL 're'VE", "\r\n", "\n\r", "\r\r\n\n", "  \n", "\n  ", " \t ", "...---!!!",
    "e\u0301a\u0308\u0323o", "\u0301", "\u200d", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇫", "👍🏽",
    "שלום עולם", "مرحبا\u200f بالعالم", "नमस्ते दुनिया", "ไทยไม่มีวรรค", "漢字かな交じり文", "한국어 \u1112\u1161\u11ab",
    "\ufffd\ufffe\uffff", "\U0010ffff", "\ufeffBOM", "\u0130\u0131\u017f\u212a\u212b", "\u01c5\ufb01",
    "<|endoftext|>", "<s></s>[UNK]", "Ġhello", "Ã©", "http://a.b/c?d=e&f#g", "x" * 3000, "ab" * 1500, "7" * 500,
    " " * 500, "\n" * 300, "\t" * 100, "!" * 500, "漢" * 400, "=" * 200 + "\n" + "-" * 200,
)  # fmt: skip


def fixed_texts() -> Iterator[str]:
    yield from _FRAGMENTS
    for piece in _FRAGMENTS:
        yield f"a{piece}b {piece} 1{piece}\n{piece}'{piece}"[:2000]
    for space in _SPACE_CHARACTERS:
        yield f"{space}a{space}{space}b {space}1{space} !{space}\n{space}{space}"
    yield from code_point_texts(range(0, NUM_CODE_POINTS, CODE_POINT_STEP))


def code_point_texts(codes: range, per_text: int = 64) -> Iterator[str]:
    """Yield texts with each code point between letters, and between an apostrophe and a digit."""
    characters = [chr(code) for code in codes if code not in SURROGATES]
    for first in range(0, len(characters), per_text):
        yield "".join(f"a{c}a'{c}1" for c in characters[first : first + per_text])


def sample_excerpts(sample: Sequence[str]) -> Iterator[str]:
    """Yield the beginnings of sample documents, up to MAX_SAMPLE_CHARACTERS."""
    remaining_characters = MAX_SAMPLE_CHARACTERS
    for text in sample:
        if remaining_characters <= 0:
            return
        yield text[: min(remaining_characters, MAX_EXCERPT_CHARACTERS)]
        remaining_characters -= min(len(text), MAX_EXCERPT_CHARACTERS)
