"""Write the tokenizer files of an export, so that transformers 4.57 and 5 use tokenizer.json as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.trainer.checkpoint.hf.folder import write_json
from tandem.trainer.data.tokenizer_file import Tree, vocabulary

CHAT_TEMPLATE_FILE, CHAT_TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
"""The template `default`, and a file NAME.jinja for each other one."""
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE_FILE, VOCAB_FILE, MERGES_FILE,
)  # fmt: skip


def write_tokenizer(
    folder: Path, tree: Tree, tokens: dict[str, str], max_seq_len: int, chat_templates: Mapping[str, str]
) -> None:
    """Write every file of the tokenizer except tokenizer.json, which is `tree`. `tokens` are those of bos, eos, pad and unk.

    The class is PreTrainedTokenizerFast, because transformers 5 builds those of other classes anew, with a pre-tokenizer of
    the class. Source: `convert_to_native_format` in tokenization_utils_tokenizers.py of transformers 5.23.
    """
    special = tokens | {"unk_token": _unk_token(tree, tokens["unk_token"])}
    special = {role: token for role, token in special.items() if token}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
    }
    if (tree.get("pre_tokenizer") or {}).get("add_prefix_space"):
        settings["add_prefix_space"] = True  # transformers 4.57 turns it off if this is absent
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)
    write_chat_templates(folder, chat_templates)
    if _is_gpt2(tree):
        write_json(folder / VOCAB_FILE, vocabulary(tree))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]]
        (folder / MERGES_FILE).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write each chat template, by its name, to the file from which transformers reads it."""
    for name, template in templates.items():
        file = folder / CHAT_TEMPLATE_FILE
        if name != "default":
            file = folder / CHAT_TEMPLATES_FOLDER / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_bytes(template.encode())


def _unk_token(tree: Tree, default: str) -> str | None:
    """Return `default` if every text has tokens. Otherwise return the model's own if it is an added token, else None.

    transformers matches this token in texts, which a token of the vocabulary alone is not.
    """
    model = tree["model"]
    unk = model.get("unk_token")
    if model.get("unk_id") is not None:
        unk = model["vocab"][model["unk_id"]][0]
    if unk is None:
        return default
    return unk if unk in {token["content"] for token in tree["added_tokens"]} else None


def _is_gpt2(tree: Tree) -> bool:
    """Whether GPT-2's class encodes as this tokenizer does. Only then does vocab.json with merges.txt define the same ids."""
    model, step = tree["model"], tree.get("pre_tokenizer") or {}
    changes = (
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
        "dropout",
    )
    is_byte_level = step.get("type") == "ByteLevel" and not step.get("add_prefix_space") and step.get("use_regex", True)
    is_plain_bpe = model.get("type") == "BPE" and not any(model.get(name) for name in changes)
    return is_plain_bpe and is_byte_level and not tree.get("normalizer")
