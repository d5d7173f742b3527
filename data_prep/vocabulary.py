"""Tokens back to text, exactly: what is cut, or is no text at all, can be seen.

The one idea: a token of a byte-level BPE is some bytes, so text is their concatenation, and a character that a border
cuts in two is shown as the bytes that are there, where a tokenizer's own decoder has one mark for everything. Other
tokenizers are asked to decode.
"""

from __future__ import annotations

import codecs
import json
import unicodedata

import numpy as np
from rich.text import Text
from tokenizers import Tokenizer

from tandem.data_prep.tokenizers.byte_level import CHARACTERS
from tandem.trainer.config import UserError

VALUES = {character: value for value, character in CHARACTERS.items()}
SPECIAL_STYLE = "bold cyan"
_IN_BYTES = "tandem.in_bytes"
_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Unicode's categories of characters that show nothing, or move what is around them."""


class Vocabulary:
    """The tokens of a tokenizer.json."""

    def __init__(self, tokenizer_json: str, eos: str, where: str):
        """Raises: UserError, starting with `where`, if it is no tokenizer.json, or has no EOS."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: is not a tokenizer.json ({reason}); prepare the corpus again") from None
        tree = json.loads(tokenizer_json)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {token["id"]: token for token in tree["added_tokens"]}
        if eos not in ids:
            raise UserError(f"{where}: has no token {eos!r}, which ends documents; prepare the corpus again")
        self.size, self.eos_id = max(ids.values()) + 1, ids[eos]
        self.kind = str(tree["model"]["type"])
        self.is_bytes = (tree.get("decoder") or {}).get("type") == "ByteLevel"
        self.specials = {ids[eos]: eos} | {
            number: token["content"] for number, token in added.items() if token["special"]
        }
        self._bytes = [b""] * self.size
        if self.is_bytes:
            for token, number in ids.items():
                self._bytes[number] = _spelled(token) if number not in added else token.encode()
        self.widths = np.array([len(token) for token in self._bytes], np.uint32) if self.is_bytes else None
        """Bytes of text in each token; None where that is not known."""

    def text(self, tokens: np.ndarray, errors: str = "replace") -> str:
        """The text of the tokens; of special ones, their names."""
        if not self.is_bytes:
            decoded: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
            return decoded
        return b"".join(map(self._bytes.__getitem__, tokens.tolist())).decode("utf-8", errors)

    def shown(self, tokens: np.ndarray) -> Text:
        """The text for the eye: special tokens in double brackets, hidden characters by sign or number, bytes of
        characters that are not whole in angle brackets.
        """
        text = Text()
        places = np.flatnonzero(np.isin(tokens, list(self.specials)))
        begin = 0
        for place in places.tolist():
            text.append(visible(self.text(tokens[begin:place], _IN_BYTES)))
            text.append(f"⟦{self.specials[int(tokens[place])]}⟧", SPECIAL_STYLE)
            begin = place + 1
        return text.append(visible(self.text(tokens[begin:], _IN_BYTES)))


def visible(text: str) -> str:
    """The text with a sign for every character that cannot be seen; a line still ends after its sign."""
    return "".join(map(_sign, text))


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if character.isascii() or unicodedata.category(character) not in _HIDDEN:
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else f"\\U{ord(character):08x}"


_SIGNS = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "␡", "\n": "↵\n", "\t": "→\t"}
"""ASCII's control characters as Unicode draws them."""


def _spelled(token: str) -> bytes:
    # A token with a character outside the alphabet stands for itself, as in the decoder of tokenizers.
    return bytes(map(VALUES.__getitem__, token)) if VALUES.keys() >= set(token) else token.encode()


def _in_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"⟨{value:02x}⟩" for value in error.object[error.start : error.end]), error.end


codecs.register_error(_IN_BYTES, _in_bytes)
