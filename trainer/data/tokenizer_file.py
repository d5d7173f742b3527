"""What a tokenizer.json does to text, and whether two of them do the same. Only JSON is read; no library encodes here."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from tandem.trainer.config import UserError
from tandem.trainer.config.outside import parse_json, read_file

Tree = dict[str, Any]
PROCESSOR_WITHOUT_TOKENS = "ByteLevel"
"""The only post-processor that adds no token. It changes offsets."""


def read_tokenizer(path: Path) -> Tree:
    """Read a tokenizer.json. Raises: UserError if it is not one."""
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or name another") from None
    return parse_tokenizer(content, path)


def parse_tokenizer(content: bytes, path: str | Path) -> Tree:
    """Parse the content of the tokenizer.json at `path`. Raises: UserError if it is not one."""
    try:
        tree = parse_json(content)
        problem = _find_problem(tree)
    except ValueError as error:
        problem = f"cannot be read as a JSON file ({error})"
    if problem:
        raise UserError(f"{path}: {problem}, so it is not a tokenizer.json; restore it, or name another")
    return dict(tree)


def file_sha256(path: Path) -> str:
    """Return the hash that a corpus's manifest and a run's checkpoints record. Raises: OSError."""
    return hashlib.sha256(read_file(path)).hexdigest()


def vocabulary(tree: Tree) -> dict[str, int]:
    """Return the id of every token."""
    words = tree["model"]["vocab"]
    ids = dict(words) if isinstance(words, dict) else {piece[0]: index for index, piece in enumerate(words)}
    return ids | {token["content"]: token["id"] for token in tree["added_tokens"]}


def corpus_form(tree: Tree, eos_token: str) -> Tree:
    """Return the tokenizer that encodes as `tandem prepare` does: no token is added to a text, and none is cut off.

    The token that ends documents becomes a special token. `eos_token` must be in the vocabulary.
    """
    tree = copy.deepcopy(tree)
    tree["post_processor"] = _without_tokens(tree.get("post_processor"))
    tree["truncation"] = tree["padding"] = None
    added = {token["content"]: token for token in tree["added_tokens"]}
    if eos_token in added:
        added[eos_token]["special"] = True
    else:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": vocabulary(tree)[eos_token], "content": eos_token, **flags, "special": True})
        tree["added_tokens"].sort(key=lambda token: token["id"])
    return tree


def same_encoding(tree: Tree, other: Tree, eos_token: str) -> bool:
    """Whether a corpus gets the same ids from both. Both may be in the form of an export, or written by another library."""
    return _encoding(tree, eos_token) == _encoding(other, eos_token)


def _encoding(tree: Tree, eos_token: str) -> Any:
    """Return everything that affects the ids of a text: vocabulary, merges, normalizer, pre-tokenizer and added tokens."""
    if eos_token not in vocabulary(tree):
        return None
    tree = corpus_form(tree, eos_token)
    model = {key: value for key, value in tree["model"].items() if value}
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    # The library adds every word of the vocabulary that is an added token, and some writers leave it out.
    model["vocab"] = vocabulary(tree) if isinstance(model.get("vocab"), dict) else model.get("vocab")
    # prepare encodes special tokens in a text like other characters, so only their ids matter.
    added = {token["content"]: token for token in tree["added_tokens"] if not token.get("special")}
    return json.dumps([model, added, _without_offsets(tree.get("normalizer")), _without_offsets(tree.get("pre_tokenizer"))],
                      sort_keys=True)  # fmt: skip


def _without_offsets(step: Any) -> Any:
    if isinstance(step, list):
        return [_without_offsets(part) for part in step]
    if isinstance(step, dict):
        return {key: _without_offsets(value) for key, value in step.items() if key != "trim_offsets"}
    return step


def _without_tokens(processor: Any) -> Any:
    """Return the post-processor without the steps that add tokens; None if nothing is left."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        kept = [step for step in map(_without_tokens, processor.get("processors") or []) if step]
        return processor | {"processors": kept} if kept else None
    return processor if processor.get("type") == PROCESSOR_WITHOUT_TOKENS else None


def _find_problem(tree: Any) -> str | None:
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        return "has no section model"
    words, added = model.get("vocab"), tree.setdefault("added_tokens", None) or []
    tree["added_tokens"] = added
    if not words or not isinstance(words, dict | list):
        return "has no model.vocab"
    if isinstance(words, dict) and not all(type(index) is int for index in words.values()):
        return "has an id in model.vocab that is not a whole number"
    if isinstance(words, list) and not all(
        isinstance(piece, list) and piece and isinstance(piece[0], str) for piece in words
    ):
        return "has a model.vocab whose entries are not pairs"
    is_token = lambda token: isinstance(token, dict) and type(token.get("id")) is int and "content" in token  # noqa: E731
    if not isinstance(added, list) or not all(map(is_token, added)):
        return "has an entry in added_tokens without id or content"
    return None
