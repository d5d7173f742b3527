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
from tandem.trainer.checkpoint.hf.folder import appearing
from tandem.trainer.checkpoint.hf.pretrained import pretrained
from tandem.trainer.checkpoint.hf.tensor_mapping import Read
from tandem.trainer.checkpoint.weights import Source, add_alibi_scaling, model_from, source, with_alibi_scaling
from tandem.trainer.checkpoint.write import model_facts, save_weights
from tandem.trainer.config import BTLM, StableLM, UserError
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.distributed.mesh import started
from tandem.trainer.metrics import progress

log = logging.getLogger(__name__)
LOGIT_TOLERANCE = 1e-5
"""Of the range of the logits: two fp32 implementations that sum in different orders stay well inside."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNSAID_SEQ_LEN = 2048
"""Longest row of an export whose origin does not say it."""


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="Hugging Face folder: config.json, safetensors, tokenizer.json")
    parser.add_argument("output", type=Path, help="folder to write; name it as run.initial_weights")


def run_import_hf(arguments: argparse.Namespace) -> None:
    """A committed checkpoint of weights lies in the output folder, with the tokenizer beside it."""
    began, output = time.perf_counter(), arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is not empty; an import writes a new folder; choose another")
    origin = opened(arguments.folder)
    facts = model_facts(origin.model, origin.mup) | {"eos_token": origin.eos_token, "max_seq_len": origin.max_seq_len}
    with appearing(output) as folder, followed("importing", origin) as read:
        size = save_weights(folder, read, shapes(origin.model), facts=facts)
        if origin.tokenizer:
            shutil.copyfile(origin.tokenizer, folder / TOKENIZER_FILE)
    model = f"{origin.model.family} of width {origin.model.width}, depth {origin.model.depth}"
    print(f"imported {model} into {output}: {spent(size, began)}")


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
    add_alibi_scaling(parser)


def run_export_hf(arguments: argparse.Namespace) -> None:
    """The output folder loads with transformers' AutoModelForCausalLM and AutoTokenizer."""
    began, dtype = time.perf_counter(), DTYPES[arguments.dtype]
    if arguments.max_seq_len is not None and arguments.max_seq_len < 1:
        raise UserError(f"--max-seq-len: {arguments.max_seq_len}; must be at least 1; leave it out or name a length")
    origin = with_alibi_scaling(opened(arguments.run_folder, arguments.step), arguments.alibi_scaling)
    with followed("exporting", origin) as read:
        convert.export(
            read, origin.model, origin.mup, arguments.output, tokenizer=origin.tokenizer, eos_token=origin.eos_token,
            max_seq_len=arguments.max_seq_len or origin.max_seq_len or UNSAID_SEQ_LEN, dtype=dtype,
        )  # fmt: skip
    size = dtype.itemsize * sum(map(math.prod, shapes(origin.model).values()))
    print(f"exported {arguments.run_folder} to {arguments.output}: {spent(size, began)}")
    if origin.lost_tokenizer:
        log.warning(
            "exported without a tokenizer: %s is not there; copy the corpus's there and export again",
            origin.lost_tokenizer,
        )
    if arguments.check:
        error = logit_error(origin, arguments.output, dtype)
        print(f"reloaded with transformers: largest difference of logits {error:.1e} of their range")
        if error > LOGIT_TOLERANCE:
            raise RuntimeError(
                f"{arguments.output}: logits differ from the trained model's by {error:.1e} of their range"
            )


def opened(path: Path, step: int | None = None) -> Source:
    """`source`, with a sign of life where stderr is a terminal: the files of a checkpoint are hashed first."""
    with Console(stderr=True).status(f"opening {path}"):
        return source(path, step)


@contextmanager
def followed(verb: str, origin: Source) -> Iterator[Read]:
    """The origin's `read`, which moves a bar along where stderr is a terminal."""
    with progress.shown(verb, sum(map(math.prod, shapes(origin.model).values()))) as advance:

        def read(name: str) -> Tensor:
            tensor = origin.read(name)
            advance(tensor.numel())
            return tensor

        yield read


def shapes(model: StableLM | BTLM) -> dict[str, tuple[int, ...]]:
    """Global name and true shape of every tensor of the model."""
    return {row.ours: row.shape for row in convert.TABLES[model.family].rows(model)}


def spent(num_bytes: int, began: float) -> str:
    """What was written since, and how long it took."""
    return f"{num_bytes / 1e9:.3g} GB in {time.perf_counter() - began:.1f} s"


def logit_error(origin: Source, export: Path, dtype: torch.dtype) -> float:
    """Largest difference between transformers' logits of the export and those of the run's weights, rounded to `dtype` as the
    export's are, relative to the range of the latter; both computed in fp32.
    """
    tokens = torch.randint(0, origin.model.vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    with started(tp_size=1) as mesh, torch.no_grad():
        model = model_from(origin, mesh, torch.float32)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        ours = model.logits(tokens.to(mesh.device), torch.zeros_like(tokens).int().to(mesh.device)).cpu()
        theirs = pretrained(export)(tokens).logits
    return float((ours - theirs).abs().max() / (ours.max() - ours.min()))
