"""`tandem import-hf` and `tandem export-hf`: import and export Hugging Face folders, one tensor at a time.

The arguments are checked here, before `conversion` imports torch. `export_check` compares an export with its weights.
"""

import argparse
import re
from pathlib import Path

from tandem.trainer.checkpoint.hf.export_checks import check_replaceable, read_fitting_tokenizer
from tandem.trainer.checkpoint.weight_source import add_alibi_scaling_argument, describe_weights
from tandem.trainer.config import UserError

DTYPES = ("bf16", "fp32")
LICENSE_PATTERN = r"[a-z0-9][a-z0-9.+-]*"


def add_import_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="Hugging Face folder: config.json, safetensors or pytorch_model.bin, tokenizer files"
    )
    parser.add_argument("output", type=Path, help="new folder; set run.init_from to it to start a run from the weights")


def run_import_hf(arguments: argparse.Namespace) -> None:
    """Write a committed checkpoint of the weights, and the tokenizer, to the output folder."""
    output = arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not an empty folder; an import needs a new one; choose another")
    weight_source = describe_weights(arguments.folder)
    # Imported here because it imports torch, which a refusal does not need.
    from tandem.trainer.tools.convert_hf.conversion import import_weights

    import_weights(weight_source, output)


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
    add_alibi_scaling_argument(parser)


def run_export_hf(arguments: argparse.Namespace) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    if arguments.max_seq_len is not None and arguments.max_seq_len < 1:
        raise UserError(
            f"--max-seq-len: {arguments.max_seq_len} is less than 1; use 1 or more, or leave the option out"
        )
    if arguments.license and not re.fullmatch(LICENSE_PATTERN, arguments.license):
        raise UserError(
            f"--license: {arguments.license!r} is not an identifier; use one of Hugging Face's, for example apache-2.0"
        )
    check_replaceable(arguments.output)
    weight_source = describe_weights(arguments.run_folder, arguments.step, arguments.alibi_scaling)
    if file := weight_source.tokenizer_file:
        read_fitting_tokenizer(file, weight_source.eos_token, weight_source.model.vocab_size)
    # Imported here because it imports torch, which a refusal does not need.
    from tandem.trainer.tools.convert_hf.conversion import export_weights

    export_weights(weight_source, arguments)
