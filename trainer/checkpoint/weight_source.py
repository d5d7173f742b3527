"""Describe weights for a command, without torch and before a weight is read: those of a run folder, an import's folder, a
checkpoint or a Hugging Face folder. `weights` opens them.
"""

import argparse
import atexit
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.trainer.checkpoint.hf import description
from tandem.trainer.checkpoint.hf.export_checks import ExportedText
from tandem.trainer.checkpoint.hf.folder import write_json
from tandem.trainer.checkpoint.hf.special_tokens import read_chat_templates, read_tokenizer_tree
from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    SavedCheckpoint,
    choose_checkpoint,
    find_damage_by_size,
    find_newest,
    list_committed,
    step_folder_name,
)
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

DEFAULT_EOS_TOKEN = "<|endoftext|>"


@dataclass(frozen=True)
class WeightSource:
    path: Path
    """The folder to open."""
    model: AnyModelConfig
    mup: MupConfig | None
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
    alibi_scaling: str | None = None
    """The option that replaced the model's position interpolation."""

    @property
    def is_hugging_face(self) -> bool:
        return self.step is None


def describe_weights(path: Path, step: int | None = None, alibi_scaling: str | None = None) -> WeightSource:
    """Describe the weights at `path`. For a run, `step` selects a checkpoint (default: the newest). No file is hashed.

    `alibi_scaling` is the value of the option that `add_alibi_scaling_argument` adds.
    Raises: UserError if there are none, or the option does not fit them.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or a Hugging Face folder")
    if step is None and (path / "config.json").is_file():
        return override_alibi_scaling(_describe_hugging_face(path), alibi_scaling)
    path = path if step is None else _find_step_folder(path, step)
    checkpoint = SavedCheckpoint(choose_checkpoint(path, find_newest, find_damage_by_size))
    return override_alibi_scaling(describe_checkpoint(path, checkpoint), alibi_scaling)


def describe_checkpoint(path: Path, checkpoint: SavedCheckpoint) -> WeightSource:
    """Describe the weights of a checkpoint that was found at `path`.

    Raises: UserError if the tokenizer beside it is not that of the weights.
    """
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
        metadata.get("special_tokens") or {}, metadata.get("token_ids") or {}, read_chat_templates(run_folder),
        is_corpus_tokenizer=is_run, num_training_tokens=metadata.get("tokens") if is_run else None,
    )  # fmt: skip
    missing_tokenizer = run_folder / TOKENIZER_FILE if is_run and not tokenizer else None
    return WeightSource(
        path, model, mup, tokenizer, eos_token, max_seq_len, text, recorded, missing_tokenizer, checkpoint.step
    )


def add_alibi_scaling_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that `override_alibi_scaling` parses."""
    parser.add_argument(
        "--alibi-scaling", metavar="KEY=NUMBER",
        help="position interpolation (BTLM only): factor=4.0 for all rows, train_seq_len=8192 for rows longer than 8192 "
        "tokens, or none for no interpolation (default: as in training)",
    )  # fmt: skip


def override_alibi_scaling(source: WeightSource, option: str | None) -> WeightSource:
    """Return the source with the position interpolation that `option` describes. The weights do not depend on it.

    Raises: UserError if the option is not valid or the model has no ALiBi.
    """
    if option is None:
        return source
    if not isinstance(source.model, BTLMConfig):
        raise UserError(
            f"--alibi-scaling: {option} cannot be used with a {source.model.family} model, which has no ALiBi; leave "
            "the option out"
        )
    scaling = None
    if option != "none":
        key, _, number = option.partition("=")
        scaling = parse_dataclass(AlibiScalingConfig, {"type": "linear", key: _parse_number(number)}, "--alibi-scaling")
        check_alibi_scaling(scaling, "--alibi-scaling")
    return replace(source, model=replace(source.model, alibi_scaling=scaling), alibi_scaling=option)


def _describe_hugging_face(folder: Path) -> WeightSource:
    model, mup = description.read_model(folder)
    special_tokens, token_ids = description.read_special_tokens(folder)
    eos_token, max_seq_len = description.read_text_settings(folder)
    tokenizer = _existing_file(folder / TOKENIZER_FILE) or _convert_tokenizer(folder)
    text = ExportedText({**special_tokens}, {**token_ids}, read_chat_templates(folder), is_corpus_tokenizer=False)
    return WeightSource(folder, model, mup, tokenizer, eos_token or DEFAULT_EOS_TOKEN, max_seq_len, text)


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
