"""Weights from wherever a user points: a run folder, an import's folder, a checkpoint, or a Hugging Face folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.layout import MARKER, committed, folder_name
from tandem.trainer.checkpoint.read import opened
from tandem.trainer.config import BTLM, Mup, StableLM, UserError
from tandem.trainer.data.manifest import TOKENIZER_FILE

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
