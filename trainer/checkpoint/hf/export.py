"""Export a model to a Hugging Face folder: config, tokenizer, weights, code and model card, one tensor at a time.

`stablelm` and `btlm` map the tensors and fields. `folder`, `tokenizer_files` and `model_card` write the files.
"""

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.hf import model_card
from tandem.trainer.checkpoint.hf.description import EXTRA_FIELD_DEFAULTS, EXTRA_FIELDS_KEY, FAMILY_MODULES
from tandem.trainer.checkpoint.hf.export_checks import ExportedText, check_replaceable, read_fitting_tokenizer
from tandem.trainer.checkpoint.hf.folder import atomic_folder, write_json
from tandem.trainer.checkpoint.hf.tensor_conversion import TensorReader, default_tensors
from tandem.trainer.checkpoint.hf.tensor_mapping import identity_mapping
from tandem.trainer.checkpoint.hf.tokenizer_files import write_tokenizer
from tandem.trainer.checkpoint.hf.weight_writer import DEFAULT_SHARD_BYTES, write_weights
from tandem.trainer.config import AnyModelConfig, MupConfig, UserError
from tandem.trainer.data.tokenizer_file import Tree, corpus_form, vocabulary

ROLES = ("bos", "eos", "pad")
NO_TEXT = ExportedText()


def export_folder(
    read_tensor: TensorReader, model: AnyModelConfig, mup: MupConfig | None, output_folder: Path, *,
    tokenizer: Path | None, eos_token: str = "<|endoftext|>", max_seq_len: int, dtype: torch.dtype,
    shard_bytes: int = DEFAULT_SHARD_BYTES, text: ExportedText = NO_TEXT,
) -> list[str]:  # fmt: skip
    """Write a folder that transformers loads offline (BTLM with `trust_remote_code=True`).

    Return the sections in which the export's tokenizer.json differs from `tokenizer`. Only one of our tensors and a part of it
    are in memory at a time. An earlier export at `output_folder` is replaced once the new one is complete.
    Raises: UserError if `output_folder` has other files, the tokenizer does not fit the model or lacks `eos_token`, a weight is
    not finite, or the format cannot store muP.
    """
    output_folder, family = Path(output_folder), FAMILY_MODULES[model.family]
    check_replaceable(output_folder)
    tree = read_fitting_tokenizer(tokenizer, eos_token, model.vocab_size) if tokenizer else None
    exported_tree = corpus_form(tree, eos_token) if tree and text.is_corpus_tokenizer else tree
    changed_sections = [key for key, value in (exported_tree or {}).items() if tree and value != tree.get(key)]
    tokens = {f"{role}_token": text.special_tokens.get(f"{role}_token") or eos_token for role in (*ROLES, "unk")}
    token_ids = _token_ids(tree, tokens, text)
    config = _build_hf_config(model, mup, token_ids, max_seq_len, dtype)
    with atomic_folder(output_folder) as folder:
        write_json(folder / "config.json", config)
        write_json(
            folder / "generation_config.json", {key: value for key, value in token_ids.items() if value is not None}
        )
        for code in family.CODE_FILES:
            shutil.copyfile(Path(__file__).parent / code, folder / code)
        if tokenizer and exported_tree:
            if changed_sections:
                write_json(folder / "tokenizer.json", exported_tree)
            else:
                shutil.copyfile(tokenizer, folder / "tokenizer.json")
            write_tokenizer(folder, exported_tree, tokens, max_seq_len, text.chat_templates)
        _write_weights(folder, read_tensor, model, dtype, shard_bytes)
        card = model_card.build_card(
            model, max_seq_len, str(dtype), eos_token if tokenizer else None, bool(changed_sections), text
        )
        model_card.write_card(folder, card)
    return changed_sections


def _build_hf_config(
    model: AnyModelConfig, mup: MupConfig | None, token_ids: dict[str, Any], max_seq_len: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Build config.json. Its pad token is null if it would be EOS: the class gives the pad token's embedding no gradient."""
    name, config = str(dtype).removeprefix("torch."), FAMILY_MODULES[model.family].to_hf_config(model, mup, max_seq_len)
    extra_fields = {field: getattr(model, field) for field in EXTRA_FIELD_DEFAULTS}
    ids = {f"{role}_token_id": token_ids.get(f"{role}_token_id") for role in ROLES}
    eos_ids = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    if ids["pad_token_id"] in eos_ids:
        ids["pad_token_id"] = None
    version = {"transformers_version": metadata.version("transformers")}
    return {**config, **ids, **version, "dtype": name, "torch_dtype": name, EXTRA_FIELDS_KEY: extra_fields}


def _write_weights(
    folder: Path, read_tensor: TensorReader, model: AnyModelConfig, dtype: torch.dtype, shard_bytes: int
) -> None:
    table = FAMILY_MODULES[model.family]
    rows = list(table.tensor_mappings(model))
    mapped_names = {piece.hf_name for row in rows for piece in row.hf_tensors}
    defaults = {name: value for name, value in default_tensors(model, dtype).items() if name not in mapped_names}
    # The defaults come first: slopes are fp32 even in a 16-bit export, and wider dtypes must precede narrower ones.
    rows = [identity_mapping(name, name, *value.shape) for name, value in defaults.items()] + rows
    dtypes = {row.name: dtype for row in rows} | {name: value.dtype for name, value in defaults.items()}

    def read_finite(name: str) -> torch.Tensor:
        if name in defaults:
            return defaults[name]
        tensor = read_tensor(name)
        if tensor.numel() and not all(
            value.to(dtype).isfinite() for value in tensor.aminmax()
        ):  # rounding keeps the order
            raise UserError(
                f"{name}: contains NaN or infinite weights as {dtype}; export an earlier checkpoint with --step"
            )
        return tensor

    write_weights(folder, read_finite, rows, dtypes, shard_bytes)


def _token_ids(tree: Tree | None, tokens: dict[str, str], text: ExportedText) -> dict[str, Any]:
    """Return the ids for config.json and generation_config.json, which are those of the tokenizer if there is one."""
    ids = vocabulary(tree) if tree else {}
    if tree and (absent := next((token for role in ROLES if (token := tokens[f"{role}_token"]) not in ids), None)):
        raise UserError(
            f"tokenizer.json: has no token {absent}, which the imported folder names; restore tokenizer.json"
        )
    given = {f"{role}_token_id": text.token_ids.get(f"{role}_token_id") for role in ROLES}
    if not tree:
        return given
    found: dict[str, Any] = {f"{role}_token_id": ids[tokens[f"{role}_token"]] for role in ROLES}
    several = given["eos_token_id"]
    if isinstance(several, list) and found["eos_token_id"] in several:
        found["eos_token_id"] = several
    return found
