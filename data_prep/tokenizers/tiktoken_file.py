"""Tokenizers of tiktoken's kind: a file of ranks, and what is known of it by name: the pattern that splits text and the
special tokens.

A ranks file lists tokens in the order in which they were learnt and says nothing of how: a tokenizer.json wants the
pair each token was made of. The one idea: that pair is what the tokens before it make of the token's own bytes. Where
they leave two parts of each token, merging by pairs gives the same ids as merging by ranks, on any bytes: when a
token is made, nothing outside it was merged with anything inside it, so the inside went the way it goes alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tandem.data_prep.tokenizers.byte_level import BYTE_VALUES, written
from tandem.trainer.config import UserError

END = "<|endoftext|>"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FILL_IN_THE_MIDDLE = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
STARCODER = (
    *("gh_stars", "filename", "issue_start", "issue_comment", "issue_closed", "jupyter_start", "jupyter_text"),
    *("jupyter_code", "jupyter_output", "empty_output", "commit_before", "commit_msg", "commit_after", "reponame"),
)


@dataclass(frozen=True)
class Scheme:
    """What a ranks file does not say."""

    ranks: int
    """Tokens in the file."""
    pattern: str | None
    """Splits text before anything is merged; None: GPT-2's, which every library has built in."""
    specials: Mapping[str, int]


SCHEMES = {
    "gpt2": Scheme(50_256, None, {END: 50_256}),
    "arcade100k": Scheme(
        100_256,
        CL100K_PATTERN % r"\p{N}",
        {
            token: 100_257 + index
            for index, token in enumerate(
                (
                    END,
                    *FILL_IN_THE_MIDDLE,
                    "<|fim_pad|>",
                    *(f"<{name}>" for name in STARCODER),
                    "<|endofprompt|>",
                    "<|im_start|>",
                    "<|im_end|>",
                    "<|pause|>",
                    *(f"<|reg{index}|>" for index in range(8)),
                    "<|extra0|>",
                )
            )
        },
    ),
}
"""Source: tiktoken's openai_public (gpt2); Stability AI's tokenizer of Stable LM 2 (arcade100k): the ranks and, as first
published, the pattern of cl100k, digits one by one, and 32 special ids, of which 100,256 is none. cl100k itself is left
out: tiktoken's pattern of today keeps white space at a document's end in one piece, and would not be met exactly."""
NAMES = {
    "arcade100k.tiktoken": "arcade100k",
    "gpt2.tiktoken": "gpt2",
    "r50k_base.tiktoken": "gpt2",
}


def read(data: bytes, where: str) -> list[bytes]:
    """The tokens of a ranks file, in the order of their ranks: every byte among them, each rank once, none left out.

    Raises: UserError naming the line that is no token in base64 and its rank, or repeats one.
    """
    tokens: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, position = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise UserError(
                f"{where}: line {number} is {shown!r}; must be a token in base64, a space and its rank; get the file again"
            ) from None
        if not token or position in tokens or token in seen:
            again = "is empty" if not token else f"repeats {'rank' if position in tokens else 'the token of rank'} "
            again += str(position if position in tokens else seen.get(token, ""))
            raise UserError(f"{where}: line {number} {again}; ranks and tokens occur once; get the file again")
        tokens[position], seen[token] = token, position
    return _complete(tokens, seen, where)


def _complete(tokens: dict[int, bytes], seen: dict[bytes, int], where: str) -> list[bytes]:
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise UserError(f"{where}: has {len(tokens)} tokens and none of rank {missing}; get the file again")
    absent = next((value for value in range(BYTE_VALUES) if bytes([value]) not in seen), None)
    if absent is not None:
        raise UserError(f"{where}: has no token for byte {absent}; every byte needs one; get the file again")
    return [tokens[rank] for rank in range(len(tokens))]


def tokenizer_json(tokens: Sequence[bytes], scheme: Scheme, where: str) -> str:
    """The tokenizer.json of these tokens: the same ids for every text as merging by ranks gives.

    Raises: UserError if the tokens are not those of the scheme, or one is not made of two that come before it.
    """
    if len(tokens) != scheme.ranks:
        raise UserError(
            f"{where}: has {len(tokens):,} tokens; must be {scheme.ranks:,}; name another file or --tokenizer-kind"
        )
    vocab = {written(token): rank for rank, token in enumerate(tokens)}
    if taken := sorted(scheme.specials.keys() & vocab.keys()):
        raise UserError(f"{where}: has {taken[0]!r} as an ordinary token; it is a special one; name another file")
    # Special tokens are in the vocabulary too, where no merge leads: only so may ids between them be left out.
    vocab |= scheme.specials
    return json.dumps(tree(vocab, merges(tokens, where), scheme.pattern, scheme.specials), ensure_ascii=False)


def merges(tokens: Sequence[bytes], where: str) -> list[tuple[str, str]]:
    """The pair that each token of more than a byte is made of, in the order of their ranks."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _merged_before(token, rank, ranks)
        if len(parts) != 2:
            raise UserError(
                f"{where}: the token of rank {rank} is not made of two before it; is this a BPE? name another file"
            )
        pairs.append((written(parts[0]), written(parts[1])))
    return pairs


def _merged_before(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What the tokens before `rank` make of these bytes: the first of the lowest rank is merged until none is left."""
    borders = list(range(len(token) + 1))
    pairs = [ranks.get(token[start : start + 2], rank) for start in borders[:-2]]
    while len(pairs) > 1 and (lowest := min(pairs)) < rank:
        index = pairs.index(lowest)
        del borders[index + 1], pairs[index]
        for near in (index - 1, index):  # the pairs that the new part is in
            if 0 <= near < len(pairs):
                pairs[near] = ranks.get(token[borders[near] : borders[near + 2]], rank)
    return [token[start:end] for start, end in pairwise(borders)]


def tree(
    vocab: Mapping[str, int], pairs: Sequence[tuple[str, str]], pattern: str | None, specials: Mapping[str, int]
) -> dict[str, Any]:
    """The content of the tokenizer.json of a byte-level BPE."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split: dict[str, Any] = byte_level | {"use_regex": True}
    if pattern is not None:
        by_pattern = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [by_pattern, byte_level | {"use_regex": False}]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token} | flags for token, index in specials.items()],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [list(pair) for pair in pairs],
        },
    }
