"""Decode tokens to text exactly, and make incomplete and invisible characters visible.

A token of a byte-level BPE is a byte string, so the text is the concatenation of its tokens. The bytes of an incomplete
character are shown, while a tokenizer's own decoder shows one replacement character for all of them. Other kinds of
tokenizer decode with their own decoder.
"""

import codecs
import unicodedata

import numpy as np
from rich.text import Text
from tokenizers import Tokenizer

from tandem.data_prep.tokenizers.byte_level import BYTE_TO_UNICODE
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import parse_json

UNICODE_TO_BYTE = {character: value for value, character in BYTE_TO_UNICODE.items()}
SPECIAL_TOKEN_STYLE = "bold cyan"
_HEX_ERROR_HANDLER = "tandem.in_bytes"
_INVISIBLE_CATEGORIES = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Unicode categories of characters that are invisible or move the characters around them."""


class Vocabulary:
    def __init__(self, tokenizer_json: str, eos_token: str, error_prefix: str):
        """Raises: UserError that starts with `error_prefix` if this is not a tokenizer.json or it has no EOS."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{error_prefix}: is not a tokenizer.json ({reason}); prepare the corpus again") from None
        tree = parse_json(tokenizer_json)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {token["id"]: token for token in tree["added_tokens"]}
        if eos_token not in ids:
            raise UserError(
                f"{error_prefix}: has no token {eos_token!r}, which ends documents; prepare the corpus again"
            )
        self.vocab_size, self.eos_id = max(ids.values()) + 1, ids[eos_token]
        self.model_type = str(tree["model"]["type"])
        self.is_byte_level = (tree.get("decoder") or {}).get("type") == "ByteLevel"
        self.special_tokens = {ids[eos_token]: eos_token} | {
            number: token["content"] for number, token in added.items() if token["special"]
        }
        self._token_bytes = [b""] * self.vocab_size
        if self.is_byte_level:
            for token, number in ids.items():
                self._token_bytes[number] = _token_to_bytes(token) if number not in added else token.encode()
        self.token_sizes_bytes = (
            np.array([len(token) for token in self._token_bytes], np.uint32) if self.is_byte_level else None
        )
        """Bytes of text in each token; None if unknown."""

    def decode(self, tokens: np.ndarray, errors: str = "replace") -> str:
        """Return the text of the tokens. A special token becomes its name."""
        if not self.is_byte_level:
            decoded: str = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
            return decoded
        return b"".join(map(self._token_bytes.__getitem__, tokens.tolist())).decode("utf-8", errors)

    def render(self, tokens: np.ndarray) -> Text:
        """Return text for display, with signs for special tokens, invisible characters and bytes of incomplete characters."""
        text = Text()
        special_indices = np.flatnonzero(np.isin(tokens, list(self.special_tokens)))
        begin = 0
        for index in special_indices.tolist():
            text.append(make_visible(self.decode(tokens[begin:index], _HEX_ERROR_HANDLER)))
            text.append(f"⟦{self.special_tokens[int(tokens[index])]}⟧", SPECIAL_TOKEN_STYLE)
            begin = index + 1
        return text.append(make_visible(self.decode(tokens[begin:], _HEX_ERROR_HANDLER)))


def make_visible(text: str) -> str:
    """Replace every invisible character with a sign. A newline is kept after its sign."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in _CONTROL_PICTURES:
        return _CONTROL_PICTURES[character]
    if character.isascii() or unicodedata.category(character) not in _INVISIBLE_CATEGORIES:
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else f"\\U{ord(character):08x}"


_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "␡", "\n": "↵\n", "\t": "→\t"}
"""Unicode's pictures of the ASCII control characters."""


def _token_to_bytes(token: str) -> bytes:
    # As in the decoder of tokenizers, a token with a character outside the alphabet is plain text.
    return bytes(map(UNICODE_TO_BYTE.__getitem__, token)) if UNICODE_TO_BYTE.keys() >= set(token) else token.encode()


def _format_bytes_as_hex(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"⟨{value:02x}⟩" for value in error.object[error.start : error.end]), error.end


codecs.register_error(_HEX_ERROR_HANDLER, _format_bytes_as_hex)
