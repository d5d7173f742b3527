"""What a tokenizer.json does to text, and whether two of them do the same. Only JSON is read; no library encodes here."""

import copy
import hashlib
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
    return find_difference(tree, other, eos_token) is None


def find_difference(tree: Tree, other: Tree, eos_token: str) -> str | None:
    """Describe why a corpus gets other ids from `other`; None if it gets the same (see `same_encoding`)."""
    ids, other_ids = ({index: token for token, index in vocabulary(one).items()} for one in (tree, other))
    if ids != other_ids:
        differing = {index for index, _ in ids.items() ^ other_ids.items()}
        names = [repr(found[:40]) if (found := one.get(min(differing))) else "no token" for one in (ids, other_ids)]
        example = f"id {min(differing)} is {names[0]} in the first and {names[1]} in the second"
        return f"ids that differ: {len(differing):,}; {example}"
    if eos_token not in ids.values():
        return f"neither has the token {eos_token!r}, which ends documents"
    parts, other_parts = _encoding(tree, eos_token), _encoding(other, eos_token)
    name = next((name for name, value in parts.items() if value != other_parts[name]), None)
    return name and f"they have the same ids, but their {name} differs"


def _encoding(tree: Tree, eos_token: str) -> dict[str, Any]:
    """Return everything that, besides the ids of tokens, affects the ids of a text. Defaults and old forms are written out."""
    tree = corpus_form(tree, eos_token)
    # False also equals 0, so the id of <unk>, which may be 0, is kept apart.
    model = {key: value for key, value in tree["model"].items() if value not in (None, False, "")}
    model = {"type": "BPE", "unk_id": tree["model"].get("unk_id")} | model
    model["merges"] = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges", [])]
    if isinstance(model.get("vocab"), dict):  # a list also has the score of each token
        del model["vocab"]
    # prepare encodes special tokens in a text like other characters, so only their ids matter.
    added = {token["content"]: {key for key in token if token[key] is True}
             for token in tree["added_tokens"] if not token.get("special")}  # fmt: skip
    steps = {name: _written_out(tree.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return {"model": model, "added_tokens": added} | steps


def _written_out(step: Any) -> Any:
    """Return a normalizer or a pre-tokenizer with its defaults, by its new names, and without what affects only offsets."""
    if isinstance(step, list):
        return [_written_out(part) for part in step]
    if not isinstance(step, dict):
        return step
    found = {key: _written_out(value) for key, value in step.items() if key not in ("trim_offsets", "str_rep")}
    if step.get("type") == "ByteLevel":
        return {"use_regex": True} | found
    if step.get("type") == "Metaspace":
        adds_prefix = found.pop("add_prefix_space", True)
        return {"prepend_scheme": "always" if adds_prefix else "never", "split": True} | found
    return found


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
    is_token = lambda token: (  # noqa: E731
        isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)
    )
    if not isinstance(added, list) or not all(map(is_token, added)):
        return "has an entry in added_tokens without id or content"
    return None
