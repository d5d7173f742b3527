"""Weights from wherever a user points: a run folder, an import's folder, a checkpoint, or a Hugging Face folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.read import opened
from trainer.config import BTLM, Mup, StableLM, UserError, load
from trainer.data import manifest
from trainer.data.manifest import TOKENIZER_FILE
from trainer.hf import convert

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


def source(path: Path) -> Source:
    """What lies at `path`, opened lazily.

    Raises: UserError when nothing there can be read.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run folder or a Hugging Face folder")
    if (path / "config.json").is_file():
        model, mup, read = convert.load(path)
        tokenizer = path / "tokenizer.json"
        return Source(model, mup, read, tokenizer if tokenizer.is_file() else None, ORDINARY_EOS, None)
    snapshot = opened(path)
    model, mup = snapshot.sections()
    tokenizer, eos_token, max_seq_len = path / TOKENIZER_FILE, ORDINARY_EOS, None
    if (path / "config.yaml").is_file():
        config = load(path / "config.yaml")
        corpus = Path(next(iter(config.data.sources.values())))
        tokenizer = corpus / TOKENIZER_FILE
        if tokenizer.is_file():
            eos_token = manifest.load(corpus).eos_token
        max_seq_len = max(phase.seq_len for phase in config.schedule.phases)
    return Source(model, mup, snapshot.weight, tokenizer if tokenizer.is_file() else None, eos_token, max_seq_len)
