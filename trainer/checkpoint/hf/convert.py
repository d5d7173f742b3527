"""Open a Hugging Face folder to read its weights, one tensor at a time. `description` reads config.json, and `weight_files` the
weights.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf.description import FAMILY_MODULES, read_model_and_aliases
from tandem.trainer.checkpoint.hf.tensor_conversion import TensorReader, default_tensors, from_hf_tensors
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorMapping
from tandem.trainer.checkpoint.hf.weight_files import FLOAT_DTYPES, StoredTensor, open_tensor_files, without_wrapper
from tandem.trainer.config import AnyModelConfig, MupConfig, StableLMConfig, UserError
from tandem.trainer.config.flops import num_parameters

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
    model, mup, aliases = read_model_and_aliases(folder)
    table = FAMILY_MODULES[model.family]
    files = without_wrapper(folder, open_tensor_files(folder), table.EMBEDDING_NAME, table.BASE_PREFIX)
    num_values = sum(math.prod(stored.shape) for stored in files.values())
    if num_parameters(model) > MAX_SIZE_RATIO * num_values:
        sizes = f"describes {num_parameters(model):,} parameters, but the files contain {num_values:,} values"
        raise UserError(f"{folder}: config.json {sizes}; correct config.json, or complete the folder")
    defaults = default_tensors(model)
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
    _check_tensors(folder, table, rows.values(), files, defaults, aliases)

    def read_hf_tensor(theirs: str) -> torch.Tensor:
        return files[theirs].read() if theirs in files else defaults[theirs]

    return model, mup, lambda ours: from_hf_tensors(rows[ours], read_hf_tensor)


def _check_tensors(
    folder: Path, table: Any, rows: Iterable[TensorMapping], files: dict[str, StoredTensor],
    defaults: dict[str, torch.Tensor], aliases: dict[str, str],
) -> None:  # fmt: skip
    expected = {piece.hf_name: piece.shape for row in rows for piece in row.hf_tensors}
    for name, shape in expected.items():
        if name not in files and name not in defaults:
            raise UserError(f"{folder}: config.json requires the tensor {name}, which is missing; complete the folder")
        if name not in files:
            continue
        stored = files[name]
        if stored.shape != shape:
            published = next(keys for part, keys in table.SHAPE_FIELDS.items() if part in name)
            keys = ", ".join(aliases.get(key, key) for key in published.split(", "))
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
