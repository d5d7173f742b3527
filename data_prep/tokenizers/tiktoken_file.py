"""tiktoken's tokenizers: a ranks file, plus the split pattern and special tokens of its kind.

A ranks file lists tokens in the order in which they were learned. A tokenizer.json also needs the pair from which each token
was merged. Encoding the token's bytes with only the earlier tokens gives that pair. If this leaves exactly two parts for
every token, merging by pairs gives the same ids as merging by ranks for any bytes. The reason: until a token is complete, no
byte inside it has merged with a byte outside it, so the bytes inside merge as they do alone.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tandem.data_prep.tokenizers.byte_level import NUM_BYTE_VALUES, to_byte_level
from tandem.trainer.config import UserError

END_OF_TEXT = "<|endoftext|>"
CONTRACTIONS_PATTERN = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K_PATTERN = (
    CONTRACTIONS_PATTERN + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STARCODER_TOKEN_NAMES = (
    "gh_stars", "filename", "issue_start", "issue_comment", "issue_closed", "jupyter_start", "jupyter_text",
    "jupyter_code", "jupyter_output", "empty_output", "commit_before", "commit_msg", "commit_after", "reponame",
)  # fmt: skip
ARCADE_SPECIAL_TOKENS = (
    END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    *(f"<{name}>" for name in STARCODER_TOKEN_NAMES), "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>",
    *(f"<|reg{index}|>" for index in range(8)), "<|extra0|>",
)  # fmt: skip


@dataclass(frozen=True)
class TiktokenScheme:
    """Properties of a tokenizer that its ranks file does not contain."""

    num_tokens: int
    """Tokens in the file."""
    split_pattern: str | None
    """Splits text before merges. None means GPT-2's pattern, which is built into every library."""
    special_tokens: Mapping[str, int]


SCHEMES = {
    "gpt2": TiktokenScheme(50_256, None, {END_OF_TEXT: 50_256}),
    "arcade100k": TiktokenScheme(
        100_256, CL100K_PATTERN % r"\p{N}", {token: 100_257 + i for i, token in enumerate(ARCADE_SPECIAL_TOKENS)}
    ),
}
"""Source: tiktoken's openai_public (gpt2); Stability AI's tokenizer of Stable LM 2 (arcade100k). The latter has the ranks of
cl100k, cl100k's first published pattern but with single digits, and 32 special ids, which do not include 100,256. cl100k
itself is not supported, because tiktoken's current pattern keeps whitespace at the end of a document in one piece, which we
would not reproduce exactly."""
KIND_BY_FILE_NAME = {"arcade100k.tiktoken": "arcade100k", "gpt2.tiktoken": "gpt2", "r50k_base.tiktoken": "gpt2"}


def parse_ranks_file(content: bytes, error_prefix: str) -> list[bytes]:
    """Return the tokens of a ranks file in the order of their ranks. Every byte is a token, and no rank is missing.

    Raises: UserError naming the line that is malformed or repeats a token or rank.
    """
    tokens: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, merge_rank = line.split()
            token, token_id = base64.b64decode(encoded, validate=True), int(merge_rank)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise UserError(
                f"{error_prefix}: line {number} is {shown!r}; it must be a token in base64, a space and its rank; "
                "get the file again"
            ) from None
        fault = None
        if not token:
            fault = "has an empty token"
        elif token_id in tokens:
            fault = f"repeats rank {token_id}"
        elif token in seen:
            fault = f"repeats the token of rank {seen[token]}"
        if fault:
            raise UserError(
                f"{error_prefix}: line {number} {fault}; ranks and tokens must be unique; get the file again"
            )
        tokens[token_id], seen[token] = token, token_id
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise UserError(f"{error_prefix}: has {len(tokens)} tokens but none of rank {missing}; get the file again")
    absent = next((value for value in range(NUM_BYTE_VALUES) if bytes([value]) not in seen), None)
    if absent is not None:
        raise UserError(f"{error_prefix}: has no token for byte {absent}; every byte needs one; get the file again")
    return [tokens[rank] for rank in range(len(tokens))]


def build_tokenizer_json(tokens: Sequence[bytes], scheme: TiktokenScheme, error_prefix: str) -> str:
    """Make a tokenizer.json from these tokens. It gives the same ids as merging by ranks.

    Raises: UserError if the tokens are not those of the scheme, or one is not a pair of earlier tokens.
    """
    if len(tokens) != scheme.num_tokens:
        raise UserError(
            f"{error_prefix}: has {len(tokens):,} tokens, but this kind has {scheme.num_tokens:,}; name another file or "
            "--tokenizer-kind"
        )
    vocab = {to_byte_level(token): rank for rank, token in enumerate(tokens)}
    if taken := sorted(scheme.special_tokens.keys() & vocab.keys()):
        raise UserError(
            f"{error_prefix}: has {taken[0]!r} as an ordinary token, but it must be a special token; name another file"
        )
    # Special tokens are also in the vocabulary, although no merge produces them: otherwise their ids could not have gaps.
    vocab |= scheme.special_tokens
    merges = find_merges(tokens, error_prefix)
    tree = build_tokenizer_tree(vocab, merges, scheme.split_pattern, scheme.special_tokens)
    return json.dumps(tree, ensure_ascii=False)


def find_merges(tokens: Sequence[bytes], error_prefix: str) -> list[tuple[str, str]]:
    """Return the pair that each token of more than one byte is merged from, in the order of ranks."""
    merge_ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for merge_rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _apply_earlier_merges(token, merge_rank, merge_ranks)
        if len(parts) != 2:
            raise UserError(
                f"{error_prefix}: the token of rank {merge_rank} is not made of two earlier tokens; name the ranks "
                "file of a BPE tokenizer"
            )
        pairs.append((to_byte_level(parts[0]), to_byte_level(parts[1])))
    return pairs


def _apply_earlier_merges(token: bytes, merge_rank: int, merge_ranks: Mapping[bytes, int]) -> list[bytes]:
    """Encode these bytes with the tokens before `merge_rank`: merge the first pair of lowest rank until no pair is left."""
    borders = list(range(len(token) + 1))
    pairs = [merge_ranks.get(token[start : start + 2], merge_rank) for start in borders[:-2]]
    while len(pairs) > 1 and (lowest := min(pairs)) < merge_rank:
        index = pairs.index(lowest)
        del borders[index + 1], pairs[index]
        for near in (index - 1, index):  # the pairs that the new part is in
            if 0 <= near < len(pairs):
                pairs[near] = merge_ranks.get(token[borders[near] : borders[near + 2]], merge_rank)
    return [token[start:end] for start, end in pairwise(borders)]


def build_tokenizer_tree(
    vocab: Mapping[str, int], merge_pairs: Sequence[tuple[str, str]], split_pattern: str | None,
    special_tokens: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Return the tree of the tokenizer.json of a byte-level BPE."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split: dict[str, Any] = byte_level | {"use_regex": True}
    if split_pattern is not None:
        by_pattern = {"type": "Split", "pattern": {"Regex": split_pattern}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [by_pattern, byte_level | {"use_regex": False}]}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": dict(vocab), "merges": [list(pair) for pair in merge_pairs],
    }  # fmt: skip
    added_tokens = [{"id": index, "content": token} | flags for token, index in special_tokens.items()]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens, "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": byte_level | {"use_regex": True}, "model": model,
    }  # fmt: skip
