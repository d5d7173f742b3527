"""Open weights for a command: from a run folder, an import's folder, a checkpoint, or a Hugging Face folder."""

import argparse
import atexit
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer import models
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.export import ExportedText
from tandem.trainer.checkpoint.hf.folder import write_json
from tandem.trainer.checkpoint.hf.special_tokens import read_chat_template, read_tokenizer_tree
from tandem.trainer.checkpoint.layout import COMMIT_MARKER, list_committed, step_folder_name
from tandem.trainer.checkpoint.read import load_weights, open_checkpoint
from tandem.trainer.config import (
    AlibiScalingConfig,
    AnyModelConfig,
    BTLMConfig,
    MupConfig,
    UserError,
    check_alibi_scaling,
    parse_dataclass,
)
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.data.tokenizer_file import file_sha256
from tandem.trainer.distributed.mesh import Mesh

DEFAULT_EOS_TOKEN = "<|endoftext|>"


@dataclass(frozen=True)
class WeightSource:
    model: AnyModelConfig
    mup: MupConfig | None
    read_tensor: Callable[[str], Tensor]
    """Maps a parameter's name to its unpadded global tensor."""
    tokenizer_file: Path | None
    """Path of tokenizer.json; None if there is none."""
    eos_token: str
    """The token that ends a document."""
    max_seq_len: int | None
    """Length of the longest rows in training; None if unknown."""
    text: ExportedText
    """What an export states about text and training."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer that the weights were trained with; None if it was not recorded."""
    missing_tokenizer_file: Path | None = None
    """Where a run's tokenizer.json should be, if it is missing."""
    step: int | None = None
    """Step of the checkpoint; None for a Hugging Face folder."""


def open_weight_source(path: Path, step: int | None = None) -> WeightSource:
    """Open the weights at `path` without reading them. For a run, `step` selects a checkpoint (default: the newest).

    Raises: UserError if there are none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or a Hugging Face folder")
    if step is None and (path / "config.json").is_file():
        model, mup, read = convert.open_folder(path)
        special_tokens, token_ids = convert.read_special_tokens(path)
        eos_token, max_seq_len = convert.read_text_settings(path)
        tokenizer = _existing_file(path / TOKENIZER_FILE) or _convert_tokenizer(path)
        text = ExportedText({**special_tokens}, {**token_ids}, read_chat_template(path), is_corpus_tokenizer=False)
        return WeightSource(model, mup, read, tokenizer, eos_token or DEFAULT_EOS_TOKEN, max_seq_len, text)
    return _from_checkpoint(path if step is None else _find_step_folder(path, step))


def load_model(weight_source: WeightSource, mesh: Mesh, dtype: torch.dtype | None = None) -> models.Decoder:
    """Build the model and load its weights. The default dtype is fp32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.bfloat16 if mesh.device.type == "cuda" else torch.float32)
    with mesh.device:
        model = models.build_model(weight_source.model, weight_source.mup, mesh, dtype=dtype)
    load_weights(model, weight_source.read_tensor, mesh)
    return model.eval()


def add_alibi_scaling_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that `override_alibi_scaling` parses."""
    parser.add_argument(
        "--alibi-scaling", metavar="KEY=NUMBER",
        help="position interpolation (BTLM only): factor=4.0 for all rows, train_seq_len=8192 for rows longer than 8192 "
        "tokens, or none for no interpolation (default: as in training)",
    )  # fmt: skip


def override_alibi_scaling(weight_source: WeightSource, option: str | None) -> WeightSource:
    """Return the source with the position interpolation that `option` describes. The weights do not depend on it.

    Raises: UserError if the option is not valid or the model has no ALiBi.
    """
    if option is None:
        return weight_source
    if not isinstance(weight_source.model, BTLMConfig):
        raise UserError(
            f"--alibi-scaling: {option} cannot be used with a {weight_source.model.family} model, which has no ALiBi; leave "
            "the option out"
        )
    scaling = None
    if option != "none":
        key, _, number = option.partition("=")
        scaling = parse_dataclass(AlibiScalingConfig, {"type": "linear", key: _parse_number(number)}, "--alibi-scaling")
        check_alibi_scaling(scaling, "--alibi-scaling")
    return replace(weight_source, model=replace(weight_source.model, alibi_scaling=scaling))


def _from_checkpoint(path: Path) -> WeightSource:
    checkpoint = open_checkpoint(path)
    model, mup = checkpoint.model_configs()
    run_folder = checkpoint.run_folder
    metadata, tokenizer = checkpoint.manifest, _existing_file(run_folder / TOKENIZER_FILE)
    max_seq_len, eos_token = metadata.get("max_seq_len"), metadata.get("eos_token") or DEFAULT_EOS_TOKEN
    recorded = metadata.get("tokenizer_sha256")
    if tokenizer and recorded and (found := file_sha256(tokenizer)) != recorded:
        raise UserError(
            f"{tokenizer}: has sha256 {found[:12]}, but the weights were trained with a tokenizer whose sha256 is "
            f"{recorded[:12]}; restore that file, or remove this one"
        )
    is_run = "phases" in metadata  # otherwise an import
    if is_run:
        max_seq_len = max(phase["seq_len"] for phase in metadata["phases"])
    text = ExportedText(
        metadata.get("special_tokens") or {}, metadata.get("token_ids") or {}, read_chat_template(run_folder),
        is_corpus_tokenizer=is_run, num_training_tokens=metadata.get("tokens") if is_run else None,
    )  # fmt: skip
    missing_tokenizer = run_folder / TOKENIZER_FILE if is_run and not tokenizer else None
    return WeightSource(
        model, mup, checkpoint.read_weight, tokenizer, eos_token, max_seq_len, text, recorded, missing_tokenizer,
        checkpoint.step,
    )  # fmt: skip


def _find_step_folder(path: Path, step: int) -> Path:
    root = path / "checkpoints"
    folder = root / step_folder_name(step)
    if (folder / COMMIT_MARKER).is_file():
        return folder
    kept = ", ".join(str(int(found.name.removeprefix("step-"))) for found in list_committed(root)) or "none"
    raise UserError(f"--step: {path} has no checkpoint of step {step}; name a step that has one: {kept}")


def _existing_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _convert_tokenizer(folder: Path) -> Path | None:
    """Return a tokenizer.json made of GPT-2's two files, in a temporary folder that the end of this process removes."""
    tree = read_tokenizer_tree(folder)
    if tree is None:
        return None
    temporary_folder = tempfile.TemporaryDirectory(prefix="tandem-tokenizer-")
    atexit.register(temporary_folder.cleanup)
    write_json(Path(temporary_folder.name) / TOKENIZER_FILE, tree)
    return Path(temporary_folder.name) / TOKENIZER_FILE


def _parse_number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
