"""`tandem import-hf` and `tandem export-hf`: weights in from and out to Hugging Face folders, one tensor at a time."""

import argparse
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.folder import atomic_folder
from tandem.trainer.checkpoint.hf.pretrained import load_pretrained
from tandem.trainer.checkpoint.hf.tensor_mapping import TensorReader
from tandem.trainer.checkpoint.weights import (
    WeightSource,
    add_alibi_scaling_argument,
    load_model,
    open_weight_source,
    override_alibi_scaling,
)
from tandem.trainer.checkpoint.write import model_metadata, save_imported_weights
from tandem.trainer.config import AnyModelConfig, UserError
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics import progress

log = logging.getLogger(__name__)
LOGIT_TOLERANCE = 1e-5
"""Of the range of the logits: two fp32 implementations that sum in different orders stay well inside."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT_MAX_SEQ_LEN = 2048
"""Longest row of an export whose source does not say it."""


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="Hugging Face folder: config.json, safetensors, tokenizer.json")
    parser.add_argument("output", type=Path, help="folder to write; name it as run.init_from")


def run_import_hf(arguments: argparse.Namespace) -> None:
    """A committed checkpoint of weights lies in the output folder, with the tokenizer beside it."""
    start_time, output = time.perf_counter(), arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is not empty; an import writes a new folder; choose another")
    weight_source = open_with_status(arguments.folder)
    metadata = model_metadata(weight_source.model, weight_source.mup) | {
        "eos_token": weight_source.eos_token,
        "max_seq_len": weight_source.max_seq_len,
    }
    with atomic_folder(output) as folder, with_progress("importing", weight_source) as read_tensor:
        num_bytes = save_imported_weights(folder, read_tensor, tensor_shapes(weight_source.model), metadata=metadata)
        if weight_source.tokenizer_file:
            shutil.copyfile(weight_source.tokenizer_file, folder / TOKENIZER_FILE)
    model = f"{weight_source.model.family} of width {weight_source.model.hidden_size}, depth {weight_source.model.num_layers}"
    print(f"imported {model} into {output}: {format_size_and_time(num_bytes, start_time)}")


def add_export_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=Path, metavar="run", help="run folder, import folder, or a checkpoint of either"
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="which of the run's kept checkpoints (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the exported weights (default bf16)")
    parser.add_argument(
        "--check", action="store_true", help="reload the export with transformers and compare its logits"
    )
    parser.add_argument(
        "--max-seq-len", type=int, help="longest row to name in config.json (default: the longest trained on); raise it with "
        "--alibi-scaling"
    )  # fmt: skip
    add_alibi_scaling_argument(parser)


def run_export_hf(arguments: argparse.Namespace) -> None:
    """The output folder loads with transformers' AutoModelForCausalLM and AutoTokenizer."""
    start_time, dtype = time.perf_counter(), DTYPES[arguments.dtype]
    if arguments.max_seq_len is not None and arguments.max_seq_len < 1:
        raise UserError(f"--max-seq-len: {arguments.max_seq_len}; must be at least 1; leave it out or name a length")
    weight_source = override_alibi_scaling(
        open_with_status(arguments.run_folder, arguments.step), arguments.alibi_scaling
    )
    with with_progress("exporting", weight_source) as read_tensor:
        convert.export_folder(
            read_tensor,
            weight_source.model,
            weight_source.mup,
            arguments.output,
            tokenizer=weight_source.tokenizer_file,
            eos_token=weight_source.eos_token,
            max_seq_len=arguments.max_seq_len or weight_source.max_seq_len or DEFAULT_MAX_SEQ_LEN,
            dtype=dtype,
        )
    num_bytes = dtype.itemsize * sum(map(math.prod, tensor_shapes(weight_source.model).values()))
    print(f"exported {arguments.run_folder} to {arguments.output}: {format_size_and_time(num_bytes, start_time)}")
    if weight_source.missing_tokenizer_file:
        log.warning(
            "exported without a tokenizer: %s is not there; copy the corpus's there and export again",
            weight_source.missing_tokenizer_file,
        )
    if arguments.check:
        error = max_logit_error(weight_source, arguments.output, dtype)
        print(f"reloaded with transformers: largest difference of logits {error:.1e} of their range")
        if error > LOGIT_TOLERANCE:
            raise RuntimeError(
                f"{arguments.output}: logits differ from the trained model's by {error:.1e} of their range"
            )


def open_with_status(path: Path, step: int | None = None) -> WeightSource:
    """`open_weight_source`, with a sign of life where stderr is a terminal: the files of a checkpoint are hashed first."""
    with Console(stderr=True).status(f"opening {path}"):
        return open_weight_source(path, step)


@contextmanager
def with_progress(description: str, weight_source: WeightSource) -> Iterator[TensorReader]:
    """The source's `read_tensor`, which moves a bar along where stderr is a terminal."""
    with progress.progress_bar(
        description, sum(map(math.prod, tensor_shapes(weight_source.model).values()))
    ) as advance:

        def read_tensor(name: str) -> Tensor:
            tensor = weight_source.read_tensor(name)
            advance(tensor.numel())
            return tensor

        yield read_tensor


def tensor_shapes(model: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name and true shape of every tensor of the model."""
    return {row.name: row.shape for row in convert.FAMILY_MODULES[model.family].tensor_mappings(model)}


def format_size_and_time(num_bytes: int, start_time: float) -> str:
    """What was written since, and how long it took."""
    return f"{num_bytes / 1e9:.3g} GB in {time.perf_counter() - start_time:.1f} s"


def max_logit_error(weight_source: WeightSource, export_folder: Path, dtype: torch.dtype) -> float:
    """Largest difference between transformers' logits of the export and those of the run's weights, rounded to `dtype` as the
    export's are, relative to the range of the latter; both computed in fp32.
    """
    tokens = torch.randint(0, weight_source.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with mesh_context(tp_size=1) as mesh, torch.no_grad():
        model = load_model(weight_source, mesh, torch.float32)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        trained_logits = model.logits(tokens.to(mesh.device), torch.zeros_like(tokens).int().to(mesh.device)).cpu()
        exported_logits = load_pretrained(export_folder)(tokens).logits
    return float((trained_logits - exported_logits).abs().max() / (trained_logits.max() - trained_logits.min()))
