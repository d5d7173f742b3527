"""Open a Hugging Face folder to read its model and its weights, one tensor at a time.

`stablelm` and `btlm` map the tensors and fields, and `folder` reads the files.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import btlm, stablelm
from tandem.trainer.checkpoint.hf.folder import open_tensor_files, read_json
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping, TensorReader, from_hf_tensors
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

MAX_SIZE_RATIO = 16
"""Largest ratio of the parameters in config.json to the values in the files. It only bounds the memory that an import takes;
missing tensors are then named one by one."""


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
