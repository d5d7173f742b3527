"""`tandem import-hf` and `tandem export-hf`: import and export Hugging Face folders, one tensor at a time."""

import argparse
import dataclasses
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer.checkpoint import weights
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import atomic_folder
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained, load_pretrained_tokenizer
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorReader
from tandem.trainer.checkpoint.hf.tokenizer_files import CHAT_TEMPLATE_FILE
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.weights import WeightSource
from tandem.trainer.checkpoint.write import save_imported_weights
from tandem.trainer.config import AnyModelConfig, UserError
from tandem.trainer.config.numbers import format_bytes
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.data.tokenizer_file import read_tokenizer
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics import progress
from tandem.trainer.metrics.history import read_history
from tandem.trainer.metrics.records import METRICS_FILE

log = logging.getLogger(__name__)
LOGIT_TOLERANCE = 1e-5
"""Allowed difference, relative to the range of the logits. Different orders of summation in fp32 cause much less."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_SEQ_LEN = 2048
"""Longest row in config.json if the exported weights do not state it."""
LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"
CHECKED_TEXTS = (
    "", " ", "Hello world", " Hello,  world!  ", "a\n\n\tb\r\n  c \n", "0 12 345 67890 3.14159 1e-5", "don't I'LL 'S",
    "e\u0301 \u00e9 \u00df \u017f \u0130", "\u6f22\u5b57 \u304b\u306a \ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "\u00a0\u2003\u3000x\ufeff\u200b", " " * 40 + "x" + "\n" * 20,
    "EOS", "a EOS b", "aEOSb", "<s> </s> [CLS] [SEP] <pad> <unk>", "def f(x):\n    return x + 1  # ok\n", "<|im_start|>user",
    "UPPER lower . , ' n't",
)  # fmt: skip
"""Texts that tokenizers may encode differently. EOS stands for the token that ends documents."""


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="Hugging Face folder: config.json, safetensors or pytorch_model.bin, tokenizer files"
    )
    parser.add_argument("output", type=Path, help="new folder; set run.init_from to it to start a run from the weights")


def run_import_hf(arguments: argparse.Namespace) -> None:
    """Write a committed checkpoint of the weights, and the tokenizer, to the output folder."""
    start_time, output = time.perf_counter(), arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not an empty folder; an import needs a new one; choose another")
    weight_source = open_with_status(arguments.folder)
    model = weight_source.model
    metadata = model_metadata(model, weight_source.mup)
    metadata |= {"eos_token": weight_source.eos_token, "max_seq_len": weight_source.max_seq_len}
    text = weight_source.text
    metadata |= {"special_tokens": text.special_tokens, "token_ids": text.token_ids}
    with atomic_folder(output) as folder, with_progress("importing", weight_source) as read_tensor:
        num_bytes = save_imported_weights(folder, read_tensor, tensor_shapes(model), metadata=metadata)
        if weight_source.tokenizer_file:
            shutil.copyfile(weight_source.tokenizer_file, folder / TOKENIZER_FILE)
        if text.chat_template:
            (folder / CHAT_TEMPLATE_FILE).write_text(text.chat_template, encoding="utf-8")
    name = f"{model.family} of width {model.hidden_size}, depth {model.num_layers}"
    safe_print(f"imported {name} into {output}: {format_size_and_time(num_bytes, start_time)}")


def add_export_hf_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    run_help = "run folder, import folder, or a checkpoint of either"
    length_help = (
        "longest row, written to config.json (default: the longest row in training); a larger value also needs "
        "--alibi-scaling"
    )
    add("run_folder", type=Path, metavar="run", help=run_help)
    add("output", type=Path, help="new folder, or an earlier export to replace")
    add("--step", type=int, help="step of the checkpoint (default: the newest checkpoint)")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of the exported weights (default bf16)")
    add(
        "--check", action="store_true", help="reload the export with transformers and compare its logits and its tokens"
    )
    add(
        "--license", help="identifier of a license for the model card, for example apache-2.0 (default: none is stated)"
    )
    add("--max-seq-len", type=int, help=length_help)
    weights.add_alibi_scaling_argument(parser)


def run_export_hf(arguments: argparse.Namespace) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    start_time, dtype = time.perf_counter(), DTYPES[arguments.dtype]
    if arguments.max_seq_len is not None and arguments.max_seq_len < 1:
        raise UserError(
            f"--max-seq-len: {arguments.max_seq_len} is less than 1; use 1 or more, or leave the option out"
        )
    if arguments.license and not re.fullmatch(LICENSE_PATTERN, arguments.license):
        raise UserError(
            f"--license: {arguments.license!r} is not an identifier; use one of Hugging Face's, for example apache-2.0"
        )
    weight_source = open_with_status(arguments.run_folder, arguments.step)
    weight_source = weights.override_alibi_scaling(weight_source, arguments.alibi_scaling)
    loss = validation_loss(arguments.run_folder, weight_source.step)
    text = dataclasses.replace(weight_source.text, license=arguments.license, validation_loss=loss)
    with with_progress("exporting", weight_source) as read_tensor:
        changed_sections = export_folder(
            read_tensor, weight_source.model, weight_source.mup, arguments.output,
            tokenizer=weight_source.tokenizer_file, eos_token=weight_source.eos_token,
            max_seq_len=arguments.max_seq_len or weight_source.max_seq_len or DEFAULT_MAX_SEQ_LEN, dtype=dtype, text=text,
        )  # fmt: skip
    num_bytes = dtype.itemsize * sum(map(math.prod, tensor_shapes(weight_source.model).values()))
    safe_print(f"exported {arguments.run_folder} to {arguments.output}: {format_size_and_time(num_bytes, start_time)}")
    if changed_sections:
        safe_print(
            f"tokenizer.json of the export has another {' and '.join(changed_sections)} than the corpus's, so that "
            "transformers encodes as the corpus was encoded"
        )
    if weight_source.missing_tokenizer_file:
        message = "exported without a tokenizer: %s is missing; copy the corpus's tokenizer there and export again"
        log.warning(message, weight_source.missing_tokenizer_file)
    if arguments.check:
        check_export(weight_source, arguments.output, dtype)


def check_export(weight_source: WeightSource, export_folder: Path, dtype: torch.dtype) -> None:
    """Load the export with transformers, and compare its logits and its tokens with those of the weights.

    Raises: UserError if they differ.
    """
    error = max_logit_error(weight_source, export_folder, dtype)
    safe_print(f"reloaded with transformers: logits differ by at most {error:.1e} of their range")
    if not error <= LOGIT_TOLERANCE:  # NaN is an error too
        problem = (
            f"logits differ from the run's by {error:.1e} of their range, at most {LOGIT_TOLERANCE:.0e} is rounding"
        )
        raise UserError(f"{export_folder}: {problem}; do not use this export, and report the versions and the model")
    if weight_source.tokenizer_file:
        if (different := find_different_text(weight_source, export_folder)) is not None:
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


def validation_loss(run_folder: Path, step: int | None) -> float | None:
    """Return the loss of the run's validation after this step, if there was one."""
    if step is None or not (run_folder / METRICS_FILE).is_file():
        return None
    losses = [record["loss"] for record in read_history(run_folder).validations if record["step"] == step]
    return losses[-1] if losses else None


def open_with_status(path: Path, step: int | None = None) -> WeightSource:
    """Open a weight source and show a spinner if stderr is a terminal. Opening a checkpoint hashes all its files."""
    with progress.open_screen().status(f"opening {path}"):
        return weights.open_weight_source(path, step)


@contextmanager
def with_progress(description: str, weight_source: WeightSource) -> Iterator[TensorReader]:
    """Yield a `read_tensor` of the source that also advances a progress bar if stderr is a terminal."""
    num_elements = sum(map(math.prod, tensor_shapes(weight_source.model).values()))
    with progress.progress_bar(description, num_elements) as advance:

        def read_tensor(name: str) -> Tensor:
            tensor = weight_source.read_tensor(name)
            advance(tensor.numel())
            return tensor

        yield read_tensor


def tensor_shapes(model: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and unpadded shape of every tensor of the model."""
    return {row.name: row.shape for row in convert.FAMILY_MODULES[model.family].tensor_mappings(model)}


def format_size_and_time(num_bytes: int, start_time: float) -> str:
    return f"{format_bytes(num_bytes)} in {time.perf_counter() - start_time:.1f} s"


def max_logit_error(weight_source: WeightSource, export_folder: Path, dtype: torch.dtype) -> float:
    """Return the largest difference between the logits of the export in transformers and those of the run's weights.

    Both are computed in fp32 from weights rounded to `dtype`. The difference is relative to the range of the run's logits.
    """
    tokens = torch.randint(0, weight_source.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with mesh_context(tp_size=1) as mesh, torch.no_grad():
        model = weights.load_model(weight_source, mesh, torch.float32)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        trained_logits = model.logits(tokens.to(mesh.device), torch.zeros_like(tokens).int().to(mesh.device)).cpu()
        exported_logits = load_pretrained(export_folder)(tokens).logits
    logit_range = float(trained_logits.max() - trained_logits.min())
    return float((trained_logits - exported_logits).abs().max()) / (logit_range or 1.0)
