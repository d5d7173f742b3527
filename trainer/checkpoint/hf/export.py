"""Export a model to a Hugging Face folder: config, tokenizer, weights and code, one tensor at a time.

`stablelm` and `btlm` map the tensors and fields, and `folder` writes the files.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import btlm
from tandem.trainer.checkpoint.hf.convert import EXTRA_FIELD_DEFAULTS, EXTRA_FIELDS_KEY, FAMILY_MODULES
from tandem.trainer.checkpoint.hf.folder import (
    DEFAULT_SHARD_BYTES,
    INDEX_FILE,
    SHARD_FILE_PATTERN,
    WEIGHTS_FILE,
    atomic_folder,
    read_json,
    write_json,
    write_weights,
)
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorReader, identity_mapping
from tandem.trainer.config import AnyModelConfig, MupConfig, UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_folder(
    read_tensor: TensorReader, model: AnyModelConfig, mup: MupConfig | None, output_folder: Path, *,
    tokenizer: Path | None, eos_token: str = "<|endoftext|>", max_seq_len: int,
    dtype: torch.dtype, shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a folder that transformers loads offline (BTLM with `trust_remote_code=True`).

    Only one of our tensors and a part of it are in memory at a time. An earlier export at `output_folder` is replaced once the
    new one is complete. `tokenizer` is a tokenizer.json with the special token `eos_token`.
    Raises: UserError if `output_folder` has other files, the tokenizer does not fit the model, or the format cannot store muP.
    """
    output_folder, family = Path(output_folder), FAMILY_MODULES[model.family]
    _check_replaceable(output_folder)
    eos_id = _special_token_id(eos_token, tokenizer, model.vocab_size) if tokenizer else None
    config = _build_hf_config(model, mup, eos_id, max_seq_len, dtype)
    with atomic_folder(output_folder) as folder:
        write_json(folder / "config.json", config)
        token_ids = {f"{role}_token_id": eos_id for role in ("bos", "eos", "pad")} if tokenizer else {}
        write_json(folder / "generation_config.json", token_ids)
        for code in family.CODE_FILES:
            shutil.copyfile(Path(__file__).parent / code, folder / code)
        if tokenizer:
            _write_tokenizer(folder, tokenizer, eos_token, max_seq_len)
        _write_weights(folder, read_tensor, model, dtype, shard_bytes)


def _build_hf_config(
    model: AnyModelConfig, mup: MupConfig | None, eos_id: int | None, max_seq_len: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Build config.json without a pad token, which would be EOS: the class gives the pad token's embedding no gradient."""
    name, config = str(dtype).removeprefix("torch."), FAMILY_MODULES[model.family].to_hf_config(model, mup, max_seq_len)
    extra_fields = {field: getattr(model, field) for field in EXTRA_FIELD_DEFAULTS}
    token_ids = {"bos_token_id": eos_id, "eos_token_id": eos_id}
    return {**config, **token_ids, "dtype": name, "torch_dtype": name, EXTRA_FIELDS_KEY: extra_fields}


def _write_weights(
    folder: Path, read_tensor: TensorReader, model: AnyModelConfig, dtype: torch.dtype, shard_bytes: int
) -> None:
    table = FAMILY_MODULES[model.family]
    rows = list(table.tensor_mappings(model))
    mapped_names = {piece.hf_name for row in rows for piece in row.hf_tensors}
    defaults = {name: value for name, value in table.default_tensors(model, dtype).items() if name not in mapped_names}
    # The defaults come first: slopes are fp32 even in a 16-bit export, and wider dtypes must precede narrower ones.
    rows = [identity_mapping(name, name, *value.shape) for name, value in defaults.items()] + rows
    dtypes = {row.name: dtype for row in rows} | {name: value.dtype for name, value in defaults.items()}
    write_weights(
        folder, lambda name: defaults[name] if name in defaults else read_tensor(name), rows, dtypes, shard_bytes
    )


def _write_tokenizer(folder: Path, tokenizer: Path, eos_token: str, max_seq_len: int) -> None:
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    special = {f"{role}_token": eos_token for role in ("bos", "eos", "pad", "unk")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": max_seq_len, **special})
    write_json(folder / "special_tokens_map.json", special)


def _special_token_id(token: str, tokenizer: Path, vocab_size: int) -> int:
    tree = read_json(Path(tokenizer))
    added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}
    words = tree.get("model", {}).get("vocab", {})
    largest = max([*added.values(), *(words.values() if isinstance(words, dict) else [len(words) - 1])])
    if token not in added:
        raise UserError(f"{tokenizer}: has no special token {token}, which ends documents; add it")
    if largest >= vocab_size:
        problem = f"has token id {largest}, but model.vocab_size is {vocab_size}"
        raise UserError(f"{tokenizer}: {problem}; name the tokenizer of the run's corpus")
    return int(added[token])


def _check_replaceable(output_folder: Path) -> None:
    if not output_folder.exists():
        return
    known = {"config.json", "generation_config.json", WEIGHTS_FILE, INDEX_FILE, *TOKENIZER_FILES, *btlm.CODE_FILES}
    if output_folder.is_dir():
        names = {path.name for path in output_folder.iterdir()}
        others = {name for name in names - known if not re.fullmatch(SHARD_FILE_PATTERN, name)}
        is_known = not others and "config.json" in names
        if not names or (is_known and EXTRA_FIELDS_KEY in read_json(output_folder / "config.json")):
            return
    raise UserError(
        f"{output_folder}: contains files that were not written by an export, and an export does not overwrite them; "
        "name a new folder"
    )
