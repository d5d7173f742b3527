"""Open a Hugging Face folder to read its model and its weights, one tensor at a time.

`config_fields` reads config.json, `stablelm` and `btlm` map the tensors and fields, and `weight_files` reads the weights.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import btlm, special_tokens, stablelm
from tandem.trainer.checkpoint.hf.config_fields import ExtraFields, SharedFields, parse_config
from tandem.trainer.checkpoint.hf.folder import read_json
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping, TensorReader, from_hf_tensors
from tandem.trainer.checkpoint.hf.weight_files import FLOAT_DTYPES, StoredTensor, open_tensor_files, without_wrapper
from tandem.trainer.config import MODEL_CONFIGS, AnyModelConfig, MupConfig, StableLMConfig, UserError, parse_dataclass
from tandem.trainer.config.flops import num_parameters

FAMILY_MODULES: dict[str, Any] = {"stablelm": stablelm, "btlm": btlm}
MODEL_TYPES = FAMILY_MODULES | {"stablelm_epoch": stablelm}
"""The table of each model_type. stablelm_epoch is the name in the first revisions of Stable LM's folders."""
EXTRA_FIELDS_KEY = "tandem"
"""Key in config.json of the fields that the published schema lacks. It also identifies our exports."""
EXTRA_FIELD_DEFAULTS = dataclasses.asdict(ExtraFields())
"""The fields under that key, and their values for folders that we did not export."""
IGNORED_SUFFIXES = (
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
)
"""Suffixes of buffers in older folders: causal masks, and tables of rotary positions, which config.json determines."""

MAX_SIZE_RATIO = 16
"""Largest ratio of the parameters in config.json to the values in the files. It only bounds the memory that an import takes;
missing tensors are then named one by one."""


def open_folder(folder: Path) -> tuple[AnyModelConfig, MupConfig | None, TensorReader]:
    """Open a Hugging Face folder. Return its model, its muP section, and a reader of its tensors by our names.

    Names, shapes and dtypes of all tensors are checked here. The reader returns values in the stored dtype, and raises
    UserError for one that is not finite.
    Raises: UserError for a folder that is damaged, incomplete, contradictory, or of another model family.
    """
    folder = Path(folder)
    model, mup = _parse_hf_config(folder, read_json(folder / "config.json"))
    table = FAMILY_MODULES[model.family]
    files = without_wrapper(folder, open_tensor_files(folder), table.EMBEDDING_NAME, table.BASE_PREFIX)
    num_values = sum(math.prod(stored.shape) for stored in files.values())
    if num_parameters(model) > MAX_SIZE_RATIO * num_values:
        sizes = f"describes {num_parameters(model):,} parameters, but the files contain {num_values:,} values"
        raise UserError(f"{folder}: config.json {sizes}; correct config.json, or complete the folder")
    defaults = table.default_tensors(model)
    if model.tie_word_embeddings and table.HEAD_NAME in files:
        _check_tied_head(folder, files.pop(table.HEAD_NAME), files.get(table.EMBEDDING_NAME))
    changed = [name for name, value in defaults.items() if name in files and not _is_close(files[name], value)]
    if isinstance(model, StableLMConfig):
        model = dataclasses.replace(model, norm_bias=model.norm_bias or bool(changed))
    elif changed:
        raise UserError(
            f"{folder}: the values of {changed[0]} are not the ALiBi slopes of {model.num_heads} heads; choose another folder"
        )
    rows = {row.name: row for row in table.tensor_mappings(model)}
    _check_tensors(folder, table, rows.values(), files, defaults)

    def read_hf_tensor(theirs: str) -> torch.Tensor:
        return files[theirs].read() if theirs in files else defaults[theirs]

    return model, mup, lambda ours: from_hf_tensors(rows[ours], read_hf_tensor)


def read_text_settings(folder: Path) -> tuple[str | None, int | None]:
    """Return the token that ends a document and the longest row's length. Each is None if the folder does not state it."""
    tokens, _ = read_special_tokens(folder)
    fields = _parse_fields(folder, read_json(folder / "config.json"))
    return tokens.get("eos_token"), getattr(fields, MODEL_TYPES[fields.model_type].MAX_SEQ_LEN_FIELD)


def read_special_tokens(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the special tokens (`bos_token`, ...) and their ids (`bos_token_id`, ...) that the folder states.

    Raises: UserError if two of its files contradict each other.
    """
    fields = _parse_fields(folder, read_json(folder / "config.json"))
    return special_tokens.read_special_tokens(folder, fields, special_tokens.read_tokenizer_tree(folder))


def _parse_fields(folder: Path, hf_config: dict[str, Any]) -> SharedFields:
    config_path, model_type = folder / "config.json", hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{config_path}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}; name another folder"
        )
    fields: SharedFields = parse_config(hf_config, config_path, MODEL_TYPES[model_type])
    return fields


def _parse_hf_config(folder: Path, hf_config: dict[str, Any]) -> tuple[AnyModelConfig, MupConfig | None]:
    config_path, fields = str(folder / "config.json"), _parse_fields(folder, hf_config)
    model_tree, mup_tree = MODEL_TYPES[fields.model_type].from_hf_config(fields, folder / "config.json")
    model_tree |= dataclasses.asdict(fields.tandem)
    model = parse_dataclass(MODEL_CONFIGS[model_tree["family"]], model_tree, config_path)
    mup = parse_dataclass(MupConfig, mup_tree, config_path) if mup_tree else None
    return model, mup


def _check_tensors(
    folder: Path, table: Any, rows: Iterable[TensorMapping], files: dict[str, StoredTensor],
    defaults: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    expected = {piece.hf_name: piece.shape for row in rows for piece in row.hf_tensors}
    for name, shape in expected.items():
        if name not in files and name not in defaults:
            raise UserError(f"{folder}: config.json requires the tensor {name}, which is missing; complete the folder")
        if name not in files:
            continue
        stored = files[name]
        if stored.shape != shape:
            keys = next(keys for part, keys in table.SHAPE_FIELDS.items() if part in name)
            raise UserError(
                f"{folder}: {name} has shape {stored.shape}, but config.json requires {shape} ({keys}); correct one of the two"
            )
        if stored.dtype not in FLOAT_DTYPES:
            supported = ", ".join(FLOAT_DTYPES)
            raise UserError(f"{folder}: {name} has dtype {stored.dtype}, not one of {supported}; convert the tensors")
    for name in files:
        if name not in expected and name not in defaults and not name.endswith(IGNORED_SUFFIXES):
            raise UserError(f"{folder}: {name} is not a tensor of the model in config.json; {_remedy_for_name(name)}")


def _remedy_for_name(name: str) -> str:
    if "lora_" in name or ".base_layer." in name:
        return "merge the adapter (merge_and_unload in PEFT) and save the model again"
    if wrapper := next((part for part in name.split(".")[:-1] if part in ("module", "_orig_mod")), None):
        return f"save the model without the wrapper that adds {wrapper!r} to names"
    return "correct config.json"


def _check_tied_head(folder: Path, head: StoredTensor, embedding: StoredTensor | None) -> None:
    if embedding is not None and not torch.equal(head.read(), embedding.read()):
        problem = "tie_word_embeddings in config.json is true, but lm_head.weight differs from the embedding"
        raise UserError(f"{folder}: {problem}; set tie_word_embeddings to false, or choose another folder")


def _is_close(stored: StoredTensor, value: torch.Tensor) -> bool:
    """Whether the file's tensor is `value`, up to rounding to 16 bits."""
    found = stored.read().float().flatten()
    return found.numel() == value.numel() and torch.allclose(found, value.flatten(), rtol=2**-8, atol=0.0)
