"""What is checked before an export begins, and what the export says about text. Nothing here needs torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.trainer.checkpoint.hf import btlm, model_card
from tandem.trainer.checkpoint.hf.description import EXTRA_FIELDS_KEY
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, SHARD_FILE_PATTERN, WEIGHTS_FILE, read_json
from tandem.trainer.checkpoint.hf.tokenizer_files import CHAT_TEMPLATES_FOLDER, TOKENIZER_FILES
from tandem.trainer.config import UserError
from tandem.trainer.data.tokenizer_file import Tree, read_tokenizer, vocabulary


@dataclass(frozen=True)
class ExportedText:
    """What an export states about text and training. What is unknown stays out."""

    special_tokens: dict[str, str | None] = field(default_factory=dict)
    """The tokens `bos_token`, `eos_token`, `pad_token` and `unk_token` of imported weights. Absent ones are EOS."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of imported weights, used if there is no tokenizer."""
    chat_templates: dict[str, str] = field(default_factory=dict)
    """Chat templates of imported weights by name; the one that is used by default is called `default`."""
    is_corpus_tokenizer: bool = True
    """Whether `tandem prepare` encoded the training text, without the tokens that the tokenizer may add to a text."""
    license: str | None = None
    num_training_tokens: int | None = None
    validation_loss: float | None = None


def check_replaceable(output_folder: Path) -> None:
    if not output_folder.exists():
        return
    known = {"config.json", "generation_config.json", WEIGHTS_FILE, INDEX_FILE, *TOKENIZER_FILES, *btlm.CODE_FILES}
    known.add(CHAT_TEMPLATES_FOLDER)
    if output_folder.is_dir():
        if model_card.is_written_by_us(output_folder):
            known.add(model_card.CARD_FILE)
        names = {path.name for path in output_folder.iterdir()}
        others = {name for name in names - known if not re.fullmatch(SHARD_FILE_PATTERN, name)}
        is_known = not others and "config.json" in names
        if not names or (is_known and EXTRA_FIELDS_KEY in read_json(output_folder / "config.json")):
            return
    raise UserError(
        f"{output_folder}: contains files that were not written by an export, and an export does not overwrite them; "
        "name a new folder"
    )


def read_fitting_tokenizer(path: Path, eos_token: str, vocab_size: int) -> Tree:
    tree = read_tokenizer(Path(path))
    ids = vocabulary(tree)
    if eos_token not in ids:
        raise UserError(
            f"{path}: has no token {eos_token}, which ends documents; name the tokenizer of the run's corpus"
        )
    if (largest := max(ids.values())) >= vocab_size:
        problem = f"has token id {largest}, but model.vocab_size is {vocab_size}"
        raise UserError(f"{path}: {problem}; name the tokenizer of the run's corpus")
    return tree
