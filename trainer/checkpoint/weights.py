"""Weights from wherever a user points: a run folder, an import's folder, a checkpoint, or a Hugging Face folder."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer import models
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.layout import MARKER, committed, folder_name
from tandem.trainer.checkpoint.read import load_weights, opened
from tandem.trainer.config import BTLM, AlibiScaling, Mup, StableLM, UserError, check_alibi_scaling, section_from
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.distributed.mesh import Mesh

ORDINARY_EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Source:
    model: StableLM | BTLM
    mup: Mup | None
    read: Callable[[str], Tensor]
    """Name -> true global tensor."""
    tokenizer: Path | None
    """tokenizer.json, where one is known."""
    eos_token: str
    """What ends a document."""
    max_seq_len: int | None
    """Longest row it was trained on, where that is known."""
    lost_tokenizer: Path | None = None
    """Where a run keeps it, if it is not there."""


def source(path: Path, step: int | None = None) -> Source:
    """What lies at `path`, of a run the checkpoint of `step` or the newest, opened lazily.

    Raises: UserError when nothing there can be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or a Hugging Face folder")
    if step is None and (path / "config.json").is_file():
        model, mup, read = convert.load(path)
        eos_token, max_seq_len = convert.text_facts(path)
        return Source(model, mup, read, _file(path / TOKENIZER_FILE), eos_token or ORDINARY_EOS, max_seq_len)
    return _checkpoint(path if step is None else _of_step(path, step))


def model_from(origin: Source, mesh: Mesh, dtype: torch.dtype | None = None) -> models.Decoder:
    """The model with the source's weights, by default in fp32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.bfloat16 if mesh.device.type == "cuda" else torch.float32)
    with mesh.device:
        model = models.build(origin.model, origin.mup, mesh, dtype=dtype)
    load_weights(model, origin.read, mesh)
    return model.eval()


def add_alibi_scaling(parser: argparse.ArgumentParser) -> None:
    """The option that `with_alibi_scaling` understands."""
    parser.add_argument(
        "--alibi-scaling", metavar="KEY=NUMBER",
        help="interpolate positions (BTLM): factor=4.0 for all rows, train_seq_len=8192 for rows longer than that, or none; "
        "default: as the model was trained",
    )  # fmt: skip


def with_alibi_scaling(origin: Source, given: str | None) -> Source:
    """The source with another position interpolation, which no weight depends on.

    Raises: UserError where it says nothing valid, or the family has no ALiBi.
    """
    if given is None:
        return origin
    if not isinstance(origin.model, BTLM):
        raise UserError(
            f"--alibi-scaling: {given}; the weights are of {origin.model.family}, without ALiBi; leave it out"
        )
    scaling = None
    if given != "none":
        key, _, number = given.partition("=")
        scaling = section_from(AlibiScaling, {"type": "linear", key: _number(number)}, "--alibi-scaling")
        check_alibi_scaling(scaling, "--alibi-scaling")
    return replace(origin, model=replace(origin.model, alibi_scaling=scaling))


def _checkpoint(path: Path) -> Source:
    snapshot = opened(path)
    model, mup = snapshot.sections()
    home = snapshot.folder.absolute().parent
    if home.name == "checkpoints":
        home = home.parent
    facts = snapshot.manifest
    tokenizer, max_seq_len, lost = home / TOKENIZER_FILE, facts.get("max_seq_len"), None
    if "phases" in facts:  # a run, not an import
        max_seq_len = max(phase["seq_len"] for phase in facts["phases"])
        lost = None if tokenizer.is_file() else tokenizer
    eos_token = facts.get("eos_token") or ORDINARY_EOS
    return Source(model, mup, snapshot.weight, _file(tokenizer), eos_token, max_seq_len, lost)


def _of_step(path: Path, step: int) -> Path:
    root = path / "checkpoints"
    folder = root / folder_name(step)
    if (folder / MARKER).is_file():
        return folder
    kept = ", ".join(str(int(found.name.removeprefix("step-"))) for found in committed(root)) or "none"
    raise UserError(f"--step: {step}; {path} has kept checkpoints of steps {kept}; name one of them")


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
