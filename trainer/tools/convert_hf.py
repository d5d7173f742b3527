"""`tandem import-hf` and `tandem export-hf`: import and export Hugging Face folders, one tensor at a time."""

import argparse
import logging
import math
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
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorReader
from tandem.trainer.checkpoint.weights import WeightSource
from tandem.trainer.checkpoint.write import model_metadata, save_imported_weights
from tandem.trainer.config import AnyModelConfig, UserError
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics import progress

log = logging.getLogger(__name__)
LOGIT_TOLERANCE = 1e-5
"""Allowed difference, relative to the range of the logits. Different orders of summation in fp32 cause much less."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_SEQ_LEN = 2048
"""Longest row in config.json if the exported weights do not state it."""


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="Hugging Face folder: config.json, safetensors, tokenizer.json")
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
    with atomic_folder(output) as folder, with_progress("importing", weight_source) as read_tensor:
        num_bytes = save_imported_weights(folder, read_tensor, tensor_shapes(model), metadata=metadata)
        if weight_source.tokenizer_file:
            shutil.copyfile(weight_source.tokenizer_file, folder / TOKENIZER_FILE)
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
    add("--check", action="store_true", help="reload the export with transformers and compare its logits")
    add("--max-seq-len", type=int, help=length_help)
    weights.add_alibi_scaling_argument(parser)


def run_export_hf(arguments: argparse.Namespace) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    start_time, dtype = time.perf_counter(), DTYPES[arguments.dtype]
    if arguments.max_seq_len is not None and arguments.max_seq_len < 1:
        raise UserError(
            f"--max-seq-len: {arguments.max_seq_len} is less than 1; use 1 or more, or leave the option out"
        )
    weight_source = open_with_status(arguments.run_folder, arguments.step)
    weight_source = weights.override_alibi_scaling(weight_source, arguments.alibi_scaling)
    with with_progress("exporting", weight_source) as read_tensor:
        export_folder(
            read_tensor, weight_source.model, weight_source.mup, arguments.output,
            tokenizer=weight_source.tokenizer_file, eos_token=weight_source.eos_token,
            max_seq_len=arguments.max_seq_len or weight_source.max_seq_len or DEFAULT_MAX_SEQ_LEN, dtype=dtype,
        )  # fmt: skip
    num_bytes = dtype.itemsize * sum(map(math.prod, tensor_shapes(weight_source.model).values()))
    safe_print(f"exported {arguments.run_folder} to {arguments.output}: {format_size_and_time(num_bytes, start_time)}")
    if weight_source.missing_tokenizer_file:
        message = "exported without a tokenizer: %s is missing; copy the corpus's tokenizer there and export again"
        log.warning(message, weight_source.missing_tokenizer_file)
    if arguments.check:
        error = max_logit_error(weight_source, arguments.output, dtype)
        safe_print(f"reloaded with transformers: logits differ by at most {error:.1e} of their range")
        if error > LOGIT_TOLERANCE:
            raise RuntimeError(f"{arguments.output}: logits differ from the run's by {error:.1e} of their range")


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
    return f"{num_bytes / 1e9:.3g} GB in {time.perf_counter() - start_time:.1f} s"


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
    return float((trained_logits - exported_logits).abs().max() / (trained_logits.max() - trained_logits.min()))
