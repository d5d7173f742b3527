"""`tandem evaluate`: measure the mean loss on held-out rows, and the loss by position in the row."""

import argparse
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.trainer.checkpoint.weight_source import WeightSource, add_alibi_scaling_argument, describe_weights
from tandem.trainer.config import DataConfig, LRConfig, PhaseConfig, ScheduleConfig, UserError
from tandem.trainer.config.outside import safe_print
from tandem.trainer.data import manifest

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    bins_help = "number of equal parts of a row; the mean loss of each part is printed (default 8)"
    add("source", type=Path, help="run folder, import folder or Hugging Face folder")
    add("--data", required=True, type=os.path.expanduser, help="prepared corpus that contains the held-out rows")
    add("--seq-len", type=int, help="tokens per row (default: the longest row that the run was trained on)")
    add("--rows", type=int, default=32, help="number of held-out rows (default 32)")
    add("--bins", type=int, default=8, help=bins_help)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add_alibi_scaling_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print mean loss, perplexity, and loss by position in the row."""
    if arguments.bins < 1:
        raise UserError(f"--bins: {arguments.bins} is less than 1; use 1 or more; 1 prints only the mean")
    weight_source = describe_weights(arguments.source, alibi_scaling=arguments.alibi_scaling)
    seq_len = weight_source.max_seq_len if arguments.seq_len is None else arguments.seq_len
    if seq_len is None:
        raise UserError(f"--seq-len: is missing, and {arguments.source} records no row length; give --seq-len TOKENS")
    check_corpus(arguments.data, weight_source, seq_len, arguments.rows)
    losses = mean_losses(weight_source, arguments.data, seq_len, arguments.rows)
    loss, num_bins = float(losses.mean()), min(arguments.bins, seq_len)
    report = {
        "loss": loss, "perplexity": math.exp(loss),
        "unigram_entropy": manifest.load_manifest(arguments.data).unigram_entropy_nats,
        "tokens": seq_len * arguments.rows, "seq_len": seq_len,
        "loss_by_position": [float(part.mean()) for part in losses.tensor_split(num_bins)],
    }  # fmt: skip
    safe_print(json.dumps(report) if arguments.json else _format_table(report))


def check_corpus(data: str, weight_source: WeightSource, seq_len: int, num_rows: int) -> None:
    """Raise UserError unless the corpus was prepared with the weights' tokenizer and has `num_rows` held-out rows."""
    corpus = manifest.load_manifest(data)
    if corpus.vocab > weight_source.model.vocab_size:
        sizes = f"a tokenizer of {corpus.vocab} ids, but the weights have only {weight_source.model.vocab_size}"
        raise UserError(f"--data: {data} was prepared with {sizes}; prepare it with the tokenizer of the weights")
    remedy = "choose a corpus that was prepared with the tokenizer of the weights"
    if file := weight_source.tokenizer_file:
        manifest.check_tokenizer(file, corpus, f"--data {data}", remedy, corpus_folder=data)
    elif weight_source.tokenizer_sha256 not in (None, corpus.tokenizer_sha256):
        raise UserError(
            f"--data: {data} was prepared with a tokenizer whose sha256 is {corpus.tokenizer_sha256[:12]}, but the weights "
            f"were trained with one whose sha256 is {weight_source.tokenizer_sha256[:12]}; {remedy}"
        )
    if num_rows < 1 or seq_len < 1 or num_rows * seq_len > corpus.validation.tokens:
        requested = f"{num_rows} rows of --seq-len {seq_len} tokens are not available"
        rule = f"both numbers must be positive, and {data} has {corpus.validation.tokens} held-out tokens"
        raise UserError(f"--rows: {requested}; {rule}; change one of the two")


def mean_losses(weight_source: WeightSource, data: str, seq_len: int, num_rows: int) -> "Tensor":
    """Return the mean loss at each position of the held-out rows, [seq_len] in fp64, on the CPU."""
    # Imported here because they import torch, which a refusal does not need.
    import torch

    from tandem.trainer.checkpoint import weights
    from tandem.trainer.data.loader import Loader
    from tandem.trainer.distributed.mesh import mesh_context
    from tandem.trainer.validation import token_losses

    phase = PhaseConfig("evaluation", num_rows * seq_len, seq_len, num_rows, 1, {"corpus": 1.0})
    schedule = ScheduleConfig(None, [phase], LRConfig("linear", 1.0, 0.0, 0, None))
    vocab_size, loss_sums = weight_source.model.vocab_size, torch.zeros(seq_len, dtype=torch.float64)
    loader = Loader(DataConfig({"corpus": data}), schedule, seed=0, vocab_size=vocab_size, dp_rank=0, dp_size=1)
    with mesh_context(tp_size=1) as mesh, torch.no_grad():
        model = weights.load_model(weights.open_weights(weight_source), mesh)
        for batch in loader.validation_batches(phase, num_rows * seq_len):  # each holds one row
            loss_sums += token_losses(model, batch, mesh).double().sum(0).cpu()
    return loss_sums / num_rows


def _format_table(report: dict[str, Any]) -> str:
    bin_losses, seq_len = report["loss_by_position"], report["seq_len"]
    edges = [round(index * seq_len / len(bin_losses)) for index in range(len(bin_losses) + 1)]
    bins = zip(pairwise(edges), bin_losses, strict=True)
    rows = [f"{first:>8}-{last - 1:<8} {loss:8.4f}" for (first, last), loss in bins]
    head = (f"loss {report['loss']:.4f} nats, perplexity {report['perplexity']:.2f}, {report['tokens']} tokens "
            f"(unigram entropy of the corpus: {report['unigram_entropy']:.4f} nats)")  # fmt: skip
    return "\n".join([head, "positions            loss", *rows])
