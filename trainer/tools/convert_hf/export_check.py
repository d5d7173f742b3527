"""`tandem export-hf --check`: load an export with transformers, and compare its logits and its tokens."""

import json
from pathlib import Path

import torch

from tandem.trainer.checkpoint import weights
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained, load_pretrained_tokenizer
from tandem.trainer.checkpoint.weight_source import WeightSource
from tandem.trainer.checkpoint.weights import OpenWeights
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data.tokenizer_file import read_tokenizer
from tandem.trainer.distributed.mesh import mesh_context

LOGIT_TOLERANCE = 1e-5
"""Allowed difference, relative to the range of the logits. Different orders of summation in fp32 cause much less."""
CHECKED_TEXTS = (
    "", " ", "Hello world", " Hello,  world!  ", "a\n\n\tb\r\n  c \n", "0 12 345 67890 3.14159 1e-5", "don't I'LL 'S",
    "e\u0301 \u00e9 \u00df \u017f \u0130", "\u6f22\u5b57 \u304b\u306a \ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "\u00a0\u2003\u3000x\ufeff\u200b", " " * 40 + "x" + "\n" * 20,
    "EOS", "a EOS b", "aEOSb", "<s> </s> [CLS] [SEP] <pad> <unk>", "def f(x):\n    return x + 1  # ok\n", "<|im_start|>user",
    "UPPER lower . , ' n't",
)  # fmt: skip
"""Texts that tokenizers may encode differently. EOS stands for the token that ends documents."""


def check_export(opened: OpenWeights, export_folder: Path, dtype: torch.dtype) -> None:
    """Load the export with transformers, and compare its logits and its tokens with those of the weights.

    Raises: UserError if they differ.
    """
    error = max_logit_error(opened, export_folder, dtype)
    safe_print(f"reloaded with transformers: logits differ by at most {error:.1e} of their range")
    if not error <= LOGIT_TOLERANCE:  # NaN is an error too
        problem = (
            f"logits differ from the run's by {error:.1e} of their range, at most {LOGIT_TOLERANCE:.0e} is rounding"
        )
        raise UserError(f"{export_folder}: {problem}; do not use this export, and report the versions and the model")
    if opened.source.tokenizer_file:
        if (different := find_different_text(opened.source, export_folder)) is not None:
            raise UserError(
                f"{export_folder}: transformers encodes or decodes {different[:60]!a} otherwise than the training text was "
                "encoded; do not use this tokenizer, and report the versions and the tokenizer"
            )
        safe_print(f"reloaded with transformers: {len(CHECKED_TEXTS)} texts have the tokens of the training text")


def find_different_text(weight_source: WeightSource, export_folder: Path) -> str | None:
    """Return the first of `CHECKED_TEXTS` for which transformers and the weights' tokenizer differ, or None."""
    from tokenizers import Tokenizer

    assert weight_source.tokenizer_file is not None
    tree = read_tokenizer(weight_source.tokenizer_file)
    for token in tree["added_tokens"]:
        token["special"] = token["special"] or token["content"] == weight_source.eos_token  # as prepare marks it
    ours, theirs = Tokenizer.from_str(json.dumps(tree)), load_pretrained_tokenizer(export_folder)
    ours.no_truncation()
    ours.no_padding()
    is_corpus_tokenizer = weight_source.text.is_corpus_tokenizer
    special_tokens = [str(token.content) for token in ours.get_added_tokens_decoder().values() if token.special]
    special_tokens.append(weight_source.eos_token)
    # As `tandem prepare` encodes: special tokens in a text are plain text.
    ours.encode_special_tokens = is_corpus_tokenizer
    for text in [part.replace("EOS", weight_source.eos_token) for part in CHECKED_TEXTS]:
        ids = ours.encode(text, add_special_tokens=not is_corpus_tokenizer).ids
        options = {"split_special_tokens": True} if is_corpus_tokenizer else {}
        found = theirs(text, **options)["input_ids"]
        if found != ids or theirs.decode(ids) != ours.decode(ids, skip_special_tokens=False):
            return text
        if not any(token in text for token in special_tokens) and theirs(text)["input_ids"] != ids:
            return text
    return None


def max_logit_error(opened: OpenWeights, export_folder: Path, dtype: torch.dtype) -> float:
    """Return the largest difference between the logits of the export in transformers and those of the run's weights.

    Both are computed in fp32 from weights rounded to `dtype`. The difference is relative to the range of the run's logits.
    """
    tokens = torch.randint(0, opened.source.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with mesh_context(tp_size=1) as mesh, torch.no_grad():
        model = weights.load_model(opened, mesh, torch.float32)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        trained_logits = model.logits(tokens.to(mesh.device), torch.zeros_like(tokens).int().to(mesh.device)).cpu()
        exported_logits = load_pretrained(export_folder)(tokens).logits
    logit_range = float(trained_logits.max() - trained_logits.min())
    return float((trained_logits - exported_logits).abs().max()) / (logit_range or 1.0)
