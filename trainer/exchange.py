"""`tandem import-hf` and `tandem export-hf`: weights in from and out to Hugging Face folders, one tensor at a time."""

import argparse
import shutil
from pathlib import Path

import torch

from trainer.checkpoint.source import Source, source
from trainer.checkpoint.write import save_weights
from trainer.config import UserError
from trainer.data.manifest import TOKENIZER_FILE
from trainer.evaluate import model_from
from trainer.hf import convert
from trainer.hf.reload import pretrained
from trainer.parallel.mesh import started

LOGIT_TOLERANCE = 1e-5
"""Of the range of the logits: two fp32 implementations that sum in different orders stay well inside."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="Hugging Face folder: config.json, safetensors, tokenizer.json")
    parser.add_argument("output", type=Path, help="folder to write; name it as run.initial_weights")


def run_import_hf(arguments: argparse.Namespace) -> None:
    """A committed checkpoint of weights lies in the output folder, with the tokenizer beside it."""
    output = arguments.output
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty; an import writes a new folder; choose another")
    origin = source(arguments.folder)
    shapes = {row.ours: row.shape for row in convert.TABLES[origin.model.family].rows(origin.model)}
    folder = save_weights(output, origin.model, origin.mup, origin.read, shapes)
    if origin.tokenizer:
        shutil.copyfile(origin.tokenizer, output / TOKENIZER_FILE)
    print(f"imported {origin.model.family} of width {origin.model.width}, depth {origin.model.depth} into {folder}")


def add_export_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="run", help="run folder; its newest checkpoint is exported")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the exported weights (default bf16)")
    parser.add_argument(
        "--check", action="store_true", help="reload the export with transformers and compare its logits"
    )


def run_export_hf(arguments: argparse.Namespace) -> None:
    """The output folder loads with transformers' AutoModelForCausalLM and AutoTokenizer."""
    origin = source(arguments.run_folder)
    convert.export(
        origin.read, origin.model, origin.mup, arguments.output, tokenizer=origin.tokenizer,
        eos_token=origin.eos_token,
        max_seq_len=origin.max_seq_len or 2048, dtype=DTYPES[arguments.dtype],
    )  # fmt: skip
    print(f"exported {arguments.run_folder} to {arguments.output}")
    if arguments.check:
        error = logit_error(origin, arguments.output, DTYPES[arguments.dtype])
        print(f"reloaded with transformers: largest difference of logits {error:.1e} of their range")
        if error > LOGIT_TOLERANCE:
            raise RuntimeError(
                f"{arguments.output}: logits differ from the trained model's by {error:.1e} of their range"
            )


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
