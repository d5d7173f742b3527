"""Write the model card of an export: README.md with facts about the weights, never a path or another name of this machine."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.trainer.config import AnyModelConfig, UserError
from tandem.trainer.config.flops import num_parameters
from tandem.trainer.config.outside import read_file

if TYPE_CHECKING:
    from tandem.trainer.checkpoint.hf.export_checks import ExportedText

CARD_FILE = "README.md"
NAMES = {"btlm": "BTLM", "stablelm": "Stable LM 2"}
MARK = "<!-- tandem export-hf, sha256 of the text above: "
VERSIONS = "transformers 4.57 and 5"


def build_card(
    model: AnyModelConfig, max_seq_len: int, dtype: str, eos_token: str | None, is_changed: bool, text: "ExportedText"
) -> str:  # fmt: skip
    """Return the text of the card. `eos_token` is None if the export has no tokenizer."""
    is_btlm, name = model.family == "btlm", NAMES[model.family]
    header = ["library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"license: {text.license}"] if text.license else []
    header += ["tags:", f"- {model.family}", "- tandem", *(["- custom_code"] if is_btlm else [])]
    facts = [
        f"* Model: {name}, width {model.hidden_size}, depth {model.num_layers}, vocabulary {model.vocab_size:,}",
        f"* Parameters: {num_parameters(model):,}, stored as {dtype.removeprefix('torch.')}",
        f"* Longest row: {max_seq_len:,} tokens",
    ]
    if text.num_training_tokens is not None:
        facts.append(f"* Training tokens: {text.num_training_tokens:,}")
    if text.validation_loss is not None:
        facts.append(f"* Loss on held-out rows of the training corpora: {text.validation_loss:.4f} nats per token")
    facts.append(f"* Written by: Tandem {_tandem_version()}, `tandem export-hf`")
    trust = ", trust_remote_code=True" if is_btlm else ""
    loading = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype=torch.bfloat16{trust})',
    ]
    if eos_token:
        loading.append(
            f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{", trust_remote_code=False" if is_btlm else ""})'
        )
    parts = ["---", *header, "---", "", f"# {name}", "", *facts, "", "## Loading", ""]
    parts += [f"The folder works with {VERSIONS}:", "", "```python", *loading, "```", ""]
    if is_btlm:
        parts += [
            "transformers has no BTLM class, so the model needs the code in this folder: `configuration_btlm.py` and",
            "`modeling_btlm.py`. The tokenizer needs no code; with `trust_remote_code=False`, transformers 5 does not ask.",
            "",
        ]
    parts += ["## Tokenizer", ""]
    if eos_token is None:
        parts += ["This export has no tokenizer.", ""]
    elif text.is_corpus_tokenizer:
        parts += [
            "The tokenizer encodes a text as the training corpus was encoded: it adds no token at the beginning or end."
            + (" Its settings for added tokens, truncation or padding were changed for this." if is_changed else ""),
            f"In training, `{eos_token}` ended every document. The same characters inside a document were plain text; call the",
            "tokenizer with `split_special_tokens=True` to encode them so.",
            "",
        ]
    else:
        parts += [f"The tokenizer is the one that was imported with the weights. `{eos_token}` ends a document.", ""]
    return "\n".join(parts)


def write_card(folder: Path, card: str) -> None:
    """Write the card with its own hash, by which `is_written_by_us` recognizes a card that nobody edited."""
    (folder / CARD_FILE).write_text(f"{card}\n{MARK}{_digest(card)} -->\n", encoding="utf-8")


def is_written_by_us(folder: Path) -> bool:
    """Whether the folder's card is as an export wrote it, so that it can be replaced."""
    try:
        card, _, rest = read_file(folder / CARD_FILE).decode().partition(f"\n{MARK}")
    except (OSError, UserError, UnicodeDecodeError):
        return False
    return rest == f"{_digest(card)} -->\n"


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()


def _tandem_version() -> str:
    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "(unknown version)"
