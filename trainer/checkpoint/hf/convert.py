"""Export a model to a Hugging Face folder and open such a folder, one tensor at a time.

This module writes and checks the contents of a folder: config, tokenizer, weights and code. `stablelm` and `btlm` map the
tensors and fields, and `folder` reads and writes the files.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import btlm, stablelm
from tandem.trainer.checkpoint.hf.folder import (
    DEFAULT_SHARD_BYTES,
    INDEX_FILE,
    SHARD_FILE_PATTERN,
    WEIGHTS_FILE,
    atomic_folder,
    open_tensor_files,
    read_json,
    write_json,
    write_weights,
)
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping, TensorReader, from_hf_tensors, identity_mapping
from tandem.trainer.config import MODEL_CONFIGS, AnyModelConfig, MupConfig, StableLMConfig, UserError, parse_dataclass
from tandem.trainer.config.flops import num_parameters

FAMILY_MODULES: dict[str, Any] = {"stablelm": stablelm, "btlm": btlm}
EXTRA_FIELDS_KEY = "tandem"
"""Key in config.json of the fields that the published schema lacks. It also identifies our exports."""
EXTRA_FIELD_DEFAULTS = {"init_truncation_sigmas": 0.0, "document_masking": False}
"""The fields under that key, and their values for folders that we did not export."""
IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of buffers in older folders: causal masks and rotary frequencies."""
SUPPORTED_DTYPES = ("F32", "BF16", "F16")
"""Dtypes of imported weights, as safetensors names them. Each converts to fp32 without loss."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

MAX_SIZE_RATIO = 16
"""Largest ratio of the parameters in config.json to the values in the files. It only bounds the memory that an import takes;
missing tensors are then named one by one."""


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


def open_folder(folder: Path) -> tuple[AnyModelConfig, MupConfig | None, TensorReader]:
    """Open a Hugging Face folder. Return its model, its muP section, and a reader of its tensors by our names.

    Names, shapes and dtypes of all tensors are checked here. The reader returns values in the stored dtype.
    Raises: UserError for a folder that is damaged, incomplete, or of another model family.
    """
    folder = Path(folder)
    hf_config = read_json(folder / "config.json")
    model, mup = _parse_hf_config(folder, hf_config)
    table = FAMILY_MODULES[model.family]
    files = open_tensor_files(folder)
    num_values = sum(math.prod(file.get_slice(name).get_shape()) for name, file in files.items())
    if num_parameters(model) > MAX_SIZE_RATIO * num_values:
        sizes = f"describes {num_parameters(model):,} parameters, but the files contain {num_values:,} values"
        raise UserError(f"{folder}: config.json {sizes}; correct config.json, or complete the folder")
    defaults = table.default_tensors(model)
    if model.tie_word_embeddings and table.HEAD_NAME in files:
        _check_tied_head(folder, files.pop(table.HEAD_NAME), files, table)
    changed = [name for name, value in defaults.items() if name in files and not _is_close(files[name], name, value)]
    if isinstance(model, StableLMConfig):
        model = dataclasses.replace(model, norm_bias=model.norm_bias or bool(changed))
    elif changed:
        raise UserError(
            f"{folder}: the values of {changed[0]} are not the ALiBi slopes of {model.num_heads} heads; choose another folder"
        )
    rows = {row.name: row for row in table.tensor_mappings(model)}
    _check_tensors(folder, rows.values(), files, defaults)

    def read_hf_tensor(theirs: str) -> torch.Tensor:
        found: torch.Tensor = files[theirs].get_tensor(theirs) if theirs in files else defaults[theirs]
        return found

    return model, mup, lambda ours: from_hf_tensors(rows[ours], read_hf_tensor)


def read_text_settings(folder: Path) -> tuple[str | None, int | None]:
    """Return the token that ends a document and the longest row's length. Each is None if the folder does not state it."""
    hf_config, settings = read_json(folder / "config.json"), folder / "tokenizer_config.json"
    eos_token = read_json(settings).get("eos_token") if settings.is_file() else None
    max_seq_len = hf_config.get(FAMILY_MODULES[hf_config["model_type"]].MAX_SEQ_LEN_FIELD)
    return eos_token["content"] if isinstance(eos_token, dict) else eos_token, max_seq_len


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


def _parse_hf_config(folder: Path, hf_config: dict[str, Any]) -> tuple[AnyModelConfig, MupConfig | None]:
    config_path, family = f"{folder}/config.json", hf_config.get("model_type")
    if family not in FAMILY_MODULES:
        families = ", ".join(FAMILY_MODULES)
        raise UserError(f"{config_path}: model_type {family!r} is not one of {families}; name another folder")
    try:
        model_tree, mup_tree = FAMILY_MODULES[family].from_hf_config(hf_config)
        model_tree |= EXTRA_FIELD_DEFAULTS | hf_config.get(EXTRA_FIELDS_KEY, {})
        model = parse_dataclass(MODEL_CONFIGS[family], model_tree, config_path)
        mup = parse_dataclass(MupConfig, mup_tree, config_path) if mup_tree else None
        if model.hidden_size % model.num_heads or model.num_heads % model.num_kv_heads:
            raise UserError(
                f"{config_path}: the width {model.hidden_size} must be a multiple of the {model.num_heads} heads, and the "
                f"number of heads a multiple of the {model.num_kv_heads} key-value heads; correct these fields"
            )
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{config_path}: {error.args[0]} is missing; add that field") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{config_path}: a field has an impossible value ({error}); correct that field") from None
    return model, mup


def _check_tensors(
    folder: Path, rows: Iterable[TensorMapping], files: dict[str, Any], defaults: dict[str, torch.Tensor]
) -> None:
    expected = {piece.hf_name: piece.shape for row in rows for piece in row.hf_tensors}
    for name, shape in expected.items():
        if name not in files and name not in defaults:
            raise UserError(f"{folder}: config.json requires the tensor {name}, which is missing; complete the folder")
        if name not in files:
            continue
        found, dtype = tuple(files[name].get_slice(name).get_shape()), files[name].get_slice(name).get_dtype()
        if found != shape:
            raise UserError(
                f"{folder}: {name} has shape {found}, but config.json requires {shape}; correct one of the two"
            )
        if dtype not in SUPPORTED_DTYPES:
            supported = ", ".join(SUPPORTED_DTYPES)
            raise UserError(f"{folder}: {name} has dtype {dtype}, not one of {supported}; convert the tensors")
    for name in files:
        if name not in expected and name not in defaults and not name.endswith(IGNORED_SUFFIXES):
            raise UserError(f"{folder}: {name} is not a tensor of the model in config.json; correct config.json")


def _check_tied_head(folder: Path, head: Any, files: dict[str, Any], table: Any) -> None:
    embedding = files[table.EMBEDDING_NAME].get_tensor(table.EMBEDDING_NAME) if table.EMBEDDING_NAME in files else None
    if embedding is not None and not torch.equal(head.get_tensor(table.HEAD_NAME), embedding):
        problem = f"{table.HEAD_NAME} differs from the embedding, but config.json ties them"
        raise UserError(f"{folder}: {problem}; set tie_word_embeddings to false")


def _is_close(file: Any, name: str, value: torch.Tensor) -> bool:
    """Whether the file's tensor is `value`, up to rounding to 16 bits."""
    found = file.get_tensor(name).float().flatten()
    return found.numel() == value.numel() and torch.allclose(found, value.flatten(), rtol=2**-8, atol=0.0)
