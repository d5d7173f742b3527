"""Losses on held-out rows: the mean for the training loop, and `tandem evaluate`, the mean by token position."""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from tandem.trainer.checkpoint.weights import Source, add_alibi_scaling, model_from, source, with_alibi_scaling
from tandem.trainer.config import Data, LearningRate, Phase, Schedule, UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.loader import Batch, Loader
from tandem.trainer.distributed.mesh import started
from tandem.trainer.validation import losses_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tandem evaluate`."""
    parser.add_argument("source", type=Path, help="run folder, import folder or Hugging Face folder")
    parser.add_argument("--data", required=True, help="prepared corpus; its held-out rows are read")
    parser.add_argument("--length", type=int, help="tokens in a row; default: the longest the run was trained on")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows to read (default 32)")
    parser.add_argument(
        "--bins", type=int, default=8, help="positions are averaged in this many equal parts (default 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_alibi_scaling(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints mean loss, perplexity, and loss by position in the row."""
    origin = with_alibi_scaling(source(arguments.source), arguments.alibi_scaling)
    length = origin.max_seq_len if arguments.length is None else arguments.length
    if length is None:
        raise UserError(
            f"--length: missing; {arguments.source} does not say how long its rows were; give --length TOKENS"
        )
    check_data(arguments.data, origin, length, arguments.rows)
    if arguments.bins < 1:
        raise UserError(f"--bins: {arguments.bins}; must be at least 1; 1 prints the mean alone")
    bins = min(arguments.bins, length)
    with started(tp_size=1) as mesh, torch.no_grad():
        model = model_from(origin, mesh)
        by_position = torch.zeros(length, dtype=torch.float64)
        for batch in held_out(arguments.data, origin.model.vocab, length, arguments.rows):
            by_position += losses_of(model, batch, mesh).double().sum(0).cpu()
        by_position /= arguments.rows
    parts = [float(part.mean()) for part in by_position.tensor_split(bins)]
    loss = float(by_position.mean())
    report = {"loss": loss, "perplexity": math.exp(loss), "unigram_entropy": manifest.load(arguments.data).unigram_entropy_nats,
              "tokens": length * arguments.rows, "length": length, "loss_by_position": parts}  # fmt: skip
    print(json.dumps(report) if arguments.json else _table(report))


def check_data(data: str, origin: Source, length: int, rows: int) -> None:
    """Raises UserError unless the corpus was made with the weights' tokenizer and has so many held-out rows."""
    corpus = manifest.load(data)
    if corpus.vocab > origin.model.vocab:
        raise UserError(
            f"--data: {data} was prepared with a tokenizer of {corpus.vocab} ids; the weights know {origin.model.vocab}; "
            "prepare it with the tokenizer of the weights"
        )
    if origin.tokenizer:
        manifest.check_tokenizer(origin.tokenizer, corpus, f"--data {data}: the weights' tokenizer")
    if rows < 1 or length < 1 or rows * length > corpus.validation.tokens:
        raise UserError(
            f"--rows: {rows} of --length {length} tokens; {data} has {corpus.validation.tokens} held-out tokens; choose "
            "positive numbers whose product is at most that"
        )


def held_out(data: str, vocab: int, length: int, rows: int) -> Iterable[Batch]:
    """`rows` held-out rows of `length` tokens, one at a time."""
    name = "corpus"
    phase = Phase("evaluation", rows * length, length, rows, 1, {name: 1.0})
    schedule = Schedule(None, [phase], LearningRate("linear", 1.0, 0.0, 0, None))
    loader = Loader(Data({name: data}), schedule, seed=0, vocab=vocab, dp_rank=0, dp_size=1)
    return loader.validation(phase, rows * length)


def _table(report: dict[str, float | list[float]]) -> str:
    parts, length = report["loss_by_position"], int(report["length"])  # type: ignore[arg-type]
    assert isinstance(parts, list)
    edges = [round(index * length / len(parts)) for index in range(len(parts) + 1)]
    rows = [f"{first:>8}-{last - 1:<8} {loss:8.4f}" for first, last, loss in zip(edges, edges[1:], parts, strict=False)]
    head = (f"loss {report['loss']:.4f} nats, perplexity {report['perplexity']:.2f}, {report['tokens']} tokens "
            f"(unigram entropy of the corpus: {report['unigram_entropy']:.4f} nats)")  # fmt: skip
    return "\n".join([head, "positions            loss", *rows])
