"""Read the tokenizer of a Hugging Face folder: its vocabulary, its special tokens and their ids.

The files repeat one another: tokenizer.json or vocab.json with merges.txt, tokenizer_config.json, special_tokens_map.json,
added_tokens.json, config.json and generation_config.json. A folder in which two of them contradict each other is refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tandem.trainer.checkpoint.hf.config_fields import SharedFields
from tandem.trainer.checkpoint.hf.folder import read_json
from tandem.trainer.checkpoint.hf.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATES_FOLDER,
    MERGES_FILE,
    VOCAB_FILE,
)
from tandem.trainer.config import UserError, parse_content
from tandem.trainer.config.constraints import Pattern
from tandem.trainer.config.outside import read_text
from tandem.trainer.data.tokenizer_file import Tree, read_tokenizer, vocabulary

ROLES = ("bos", "eos", "pad", "unk")
REMEDY = "correct the wrong one, or choose another folder"
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


@dataclass(frozen=True)
class ChatTemplate:
    name: Annotated[str, Pattern(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a name of letters, digits, _, . and -")]
    template: str


@dataclass(frozen=True)
class ChatTemplates:
    """The list form of `chat_template` in tokenizer_config.json."""

    chat_template: list[ChatTemplate]


def read_tokenizer_tree(folder: Path) -> Tree | None:
    """Return the folder's tokenizer.json, or one made of GPT-2's two files. Return None if there is neither.

    Raises: UserError if both are there and differ, or the two files are not those of GPT-2's class.
    """
    has_vocab = (folder / VOCAB_FILE).exists() and (folder / MERGES_FILE).exists()
    if not (folder / "tokenizer.json").exists():
        return _build_tree(folder) if has_vocab else None
    tree = read_tokenizer(folder / "tokenizer.json")
    if has_vocab and tree["model"].get("type") == "BPE":
        words, pairs = read_json(folder / VOCAB_FILE), _read_merges(folder)
        # Some writers put the added tokens into vocab.json.
        known = vocabulary(tree)
        if different := next((word for word, index in words.items() if known.get(word) != index), None):
            problem = (
                f"{VOCAB_FILE} gives {different!r} the id {words[different]}, but tokenizer.json {known.get(different)}"
            )
            raise UserError(f"{folder}: {problem}; {REMEDY}")
        given = tree["model"].get("merges")
        merges = [
            pair.split(" ") if isinstance(pair, str) else pair for pair in (given if isinstance(given, list) else [])
        ]
        if merges != pairs:
            raise UserError(f"{folder}: {MERGES_FILE} and tokenizer.json have different merges; {REMEDY}")
    return tree


def read_special_tokens(folder: Path, fields: SharedFields, tree: Tree | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the special tokens (`bos_token`, …) and their ids (`bos_token_id`, …) that the folder states.

    The id of EOS is a list if the folder states several.

    Raises: UserError if two files contradict each other, or an id is not below the model's vocab_size.
    """
    tokens = _read_tokens(folder)
    stated_ids = _read_ids(folder, fields)
    ids = vocabulary(tree) if tree else {}
    vocab_size, token_ids = fields.vocab_size, dict[str, Any]()
    if largest := max(ids, key=lambda token: ids[token], default=None):
        _check_below(folder, f"token {largest!r} of the tokenizer has the id", ids[largest], vocab_size)
    for index, token in _added_tokens(folder):
        if ids.get(token, index) != index:
            problem = f"added_tokens_decoder gives {token!r} the id {index}, but the tokenizer {ids[token]}"
            raise UserError(f"{folder}: {problem}; {REMEDY}")
    for role in ROLES:
        name, places = f"{role}_token", stated_ids[role]
        for place, values in places.items():
            _check_below(folder, f"{place} is", max(values), vocab_size)
        places = dict(places)
        if ids and name in tokens:
            if tokens[name] not in ids:
                raise UserError(f"{folder}: {name} is {tokens[name]!r}, but the tokenizer has no such token; {REMEDY}")
            places = {f"the id of {name} {tokens[name]!r}": [ids[tokens[name]]], **places}
        for first, second in zip(places, list(places)[1:], strict=False):
            if not set(places[first]) & set(places[second]):
                raise UserError(
                    f"{folder}: {first} is {_text(places[first])}, but {second} is {_text(places[second])}; {REMEDY}"
                )
        if places:
            lists = [values for values in stated_ids[role].values() if len(values) > 1]
            token_ids[f"{role}_token_id"] = lists[0] if lists else next(iter(places.values()))[0]
    names = {index: token for token, index in ids.items()}
    first_ids = {role: next(iter(places.values()))[0] for role, places in stated_ids.items() if places}
    found = {f"{role}_token": names.get(index) for role, index in first_ids.items()}
    return {name: token for name, token in found.items() if token is not None} | tokens, token_ids


def read_chat_templates(folder: Path) -> dict[str, str]:
    """Return the folder's chat templates by name, from their own files and from tokenizer_config.json.

    Raises: UserError if a template cannot be read, or the two places give one name different templates.
    """
    templates: dict[str, str] = {}
    files = {"default": folder / CHAT_TEMPLATE_FILE} if (folder / CHAT_TEMPLATE_FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / CHAT_TEMPLATES_FOLDER).glob("*.jinja"))}
    for name, path in files.items():
        try:
            templates[name] = read_text(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); copy the file again") from None
    settings = folder / "tokenizer_config.json"
    for name, template in (_settings_templates(settings) if settings.exists() else {}).items():
        if templates.setdefault(name, template) != template:
            problem = f"{settings.name} has another chat template {name!r} than {files[name].relative_to(folder)}"
            raise UserError(f"{folder}: {problem}; {REMEDY}")
    return templates


def _settings_templates(settings: Path) -> dict[str, str]:
    """Return the chat templates in tokenizer_config.json: one text, or a list of names and texts."""
    found = read_json(settings).get("chat_template")
    entries = [ChatTemplate("default", found)] if isinstance(found, str) else []
    if found is not None and not isinstance(found, str):
        tree = {"chat_template": found}
        entries = parse_content(ChatTemplates, tree, settings, "correct it, or choose another folder").chat_template
    templates = {entry.name: entry.template for entry in entries}
    if len(templates) < len(entries):
        raise UserError(f"{settings}: chat_template gives a name twice; remove one of the two")
    return templates


def _read_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that the two settings files state."""
    tokens: dict[str, str] = {}
    origins: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        tree = read_json(folder / file) if (folder / file).exists() else {}
        for name in (f"{role}_token" for role in ROLES):
            value = tree.get(name)
            token = value.get("content") if isinstance(value, dict) else value
            if token is None:
                continue
            if not isinstance(token, str):
                raise UserError(f"{folder / file}: {name} is {token!r}, which is not a text; correct it")
            if tokens.setdefault(name, token) != token:
                problem = f"{file} has the {name} {token!r}, but {origins[name]} {tokens[name]!r}"
                raise UserError(f"{folder}: {problem}; {REMEDY}")
            origins.setdefault(name, file)
    return tokens


def _read_ids(folder: Path, fields: SharedFields) -> dict[str, dict[str, list[int]]]:
    """Return the ids of each role by the place that states them. EOS may be a list: each of its ids ends a text."""
    file = "generation_config.json"
    trees = {"config.json": vars(fields), file: read_json(folder / file) if (folder / file).exists() else {}}
    found: dict[str, dict[str, list[int]]] = {role: {} for role in ROLES}
    for place, tree in trees.items():
        for role in ROLES:
            value = tree.get(f"{role}_token_id")
            if value is None or value == -1:  # both mean that there is none
                continue
            values = value if isinstance(value, list) and role == "eos" else [value]
            if not values or not all(type(index) is int and index >= 0 for index in values):
                raise UserError(
                    f"{folder / place}: {role}_token_id is {value!r}, but an id is 0 or a larger whole number; correct it"
                )
            found[role][f"{role}_token_id of {place}"] = values
    return found


def _build_tree(folder: Path) -> Tree:
    """Make a tokenizer.json that encodes as GPT-2's class does with the folder's files. Source: transformers' GPT2Tokenizer."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    kind = settings.get("tokenizer_class", GPT2_CLASSES[0])
    remedy = "save tokenizer.json with transformers (AutoTokenizer.from_pretrained and save_pretrained)"
    if kind not in GPT2_CLASSES or settings.get("add_bos_token"):
        problem = f"tokenizer_class is {kind!r}" if kind not in GPT2_CLASSES else "add_bos_token is true"
        raise UserError(f"{folder}: has no tokenizer.json, and {problem} in tokenizer_config.json; {remedy}")
    words, extra = read_json(folder / VOCAB_FILE), folder / "added_tokens.json"
    added = read_json(extra) if extra.exists() else {}
    for file, ids in ((VOCAB_FILE, words), (extra.name, added)):
        if wrong := next((token for token, index in ids.items() if type(index) is not int), None):
            raise UserError(
                f"{folder / file}: {wrong!r} has the id {ids[wrong]!r}, which is not a whole number; copy it again"
            )
    added |= {token: index for index, token in _added_tokens(folder)}
    added |= {token: words[token] for token in _read_tokens(folder).values() if token in words}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = sorted((index, token) for token, index in added.items())
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(settings.get("add_prefix_space")),
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": words | added,
        "merges": _read_merges(folder),
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in ordered],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip


def _added_tokens(folder: Path) -> list[tuple[int, str]]:
    file = folder / "tokenizer_config.json"
    entries = read_json(file).get("added_tokens_decoder") if file.exists() else None
    try:
        return [(int(index), str(entry["content"])) for index, entry in (entries or {}).items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: added_tokens_decoder is not a mapping of ids to tokens; {REMEDY}") from None


def _read_merges(folder: Path) -> list[list[str]]:
    try:
        lines = read_text(folder / MERGES_FILE).split("\n")
    except ValueError as error:
        raise UserError(f"{folder / MERGES_FILE}: is not UTF-8 ({error}); copy the file again") from None
    pairs = [
        line.split(" ")
        for number, line in enumerate(lines)
        if line and not (number == 0 and line.startswith("#version"))
    ]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise UserError(
            f"{folder / MERGES_FILE}: {' '.join(wrong)[:60]!r} is not two tokens with a space between; copy the file again"
        )
    return pairs


def _check_below(folder: Path, what: str, index: int, vocab_size: int) -> None:
    if index >= vocab_size:
        problem = f"{what} {index}, but vocab_size in config.json is {vocab_size}"
        raise UserError(f"{folder}: {problem}; {REMEDY}")


def _text(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
