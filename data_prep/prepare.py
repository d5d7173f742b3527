"""`tandem prepare`: text in; shards, tokenizer.json and manifest.json out, the same bytes every time.

Documents are read in one fixed order, encoded by workers that share nothing, and ordered by a hash of seed,
place and text, so neither the number of workers nor a kill in between can show in the result. The manifest is
written last.

Limit: the token ids of the whole corpus are held in memory until they are written, 2 bytes a token (4 above
65,536 ids) and about 60 bytes a document, next to one shard; 10 billion tokens need some 25 GB. A killed
preparation starts again from the beginning. A BPE trained here reads all text of the corpus; for a large one
give --tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_prep import folder, read, tokenizer, write
from data_prep.read import Document, Input
from data_prep.tokenizer import Encoded, Encoder
from trainer.config import UserError
from trainer.data import manifest
from trainer.data.manifest import Manifest

BATCH_CHARACTERS = 1 << 20
ORDINARY_VOCAB = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem prepare`."""
    add = parser.add_argument
    kinds = "folders or files: text, code, .jsonl[.gz|.zst], .parquet"
    add("--input", nargs="+", required=True, metavar="PATH", help=kinds)
    add("--output", required=True, metavar="DIR", help="folder to create")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to encode with")
    trained = f"ids of a byte-level BPE trained on the corpus (default {ORDINARY_VOCAB})"
    choice.add_argument("--vocab", type=int, metavar="N", help=trained)
    add("--eos", default="<|endoftext|>", metavar="TOKEN", help="ends each document (default %(default)s)")
    add("--text-field", default="text", metavar="NAME", help="of jsonl and parquet (default %(default)s)")
    add("--glob", metavar="PATTERN", help="files to take from folders, instead of known suffixes")
    kept = "share of documents kept for validation (default %(default)s)"
    add("--held-out", type=float, default=0.005, metavar="FRACTION", help=kept)
    add("--skip-undecodable", action="store_true", help="leave out, and count, text that is not UTF-8")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help="processes that tokenize (default: cores)")
    add("--seed", type=int, default=0, help="of the shuffle (default %(default)s)")
    size = "tokens in a %s (default %%(default)s)"
    add("--sample-tokens", type=int, default=65_536, metavar="N", help=size % "tar sample")
    add("--shard-tokens", type=int, default=1 << 25, metavar="N", help=size % "shard, at least")


def run(args: argparse.Namespace) -> None:
    """DIR is a finished corpus of these inputs and settings; one that already was is left as it is.

    Raises: UserError; then nothing is left behind that was not there before.
    """
    _check_arguments(args)
    output, console = Path(args.output), Console(stderr=True)
    given = tokenizer.read(args.tokenizer) if args.tokenizer else None
    if given is not None:
        tokenizer.encoder(given, args.eos, args.seed, args.tokenizer)
    files = read.inputs(args.input, args.glob, output)
    settings = _settings(args, files, given)
    if folder.is_finished(output, settings):
        print(f"{output}: already prepared with these settings; nothing to do")
        return
    with folder.claimed(output, settings):
        if folder.is_finished(output, settings):
            print(f"{output}: was prepared meanwhile with these settings; nothing to do")
            return
        corpus = _prepare(args, files, given, settings, console)
    _print_counts(output, corpus)


@dataclass
class Corpus:
    """Every document of the corpus as ids, in reading order."""

    batches: list[Encoded] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"files": 0, "skipped_files": 0, "empty_documents": 0})

    def order(self) -> np.ndarray:
        """Indices of all documents in the order of the shuffle."""
        return np.argsort(np.concatenate([batch.ranks for batch in self.batches]), kind="stable")

    def held_out(self, fraction: float) -> np.ndarray:
        """Whether each document is kept for validation: by its text alone, so no two copies are parted."""
        return np.concatenate([batch.draws for batch in self.batches]) < fraction

    def documents(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of the documents with these indices."""
        batch_of = np.repeat(np.arange(len(self.batches)), [len(batch.lengths) for batch in self.batches])
        ends = np.concatenate([np.cumsum(batch.lengths) for batch in self.batches])
        lengths = np.concatenate([batch.lengths for batch in self.batches])
        for index in order:
            yield self.batches[batch_of[index]].tokens[ends[index] - lengths[index] : ends[index]]


def _prepare(
    args: argparse.Namespace,
    files: list[Input],
    given: str | None,
    settings: dict[str, Any],
    console: Console,
) -> Manifest:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, _alone_on_screen(progress):
        corpus, total = Corpus(), sum(file.bytes for file in files)

        def texts(description: str) -> Iterator[Document]:
            task = progress.add_task(description, total=total)
            corpus.counts = Corpus().counts
            yield from _documents(args, files, corpus.counts, lambda count: progress.advance(task, count))
            progress.update(task, completed=total)

        text = given
        if text is None:
            every = (document.text for document in texts("training the tokenizer"))
            training = (text for text in every if tokenizer.draw(text) >= args.held_out)
            text = tokenizer.train(training, _vocab(args), args.eos)
        using = tokenizer.encoder(text, args.eos, args.seed, args.tokenizer or "--eos")
        for batch in tokenizer.encode_all(using, _batches(texts("encoding")), args.workers):
            corpus.batches.append(batch)
        if not corpus.batches:
            raise UserError(
                f"--input: {', '.join(args.input)} holds no text; every document is empty; name another path"
            )
        return _write(args, corpus, using, text, settings, progress)


@contextmanager
def _alone_on_screen(progress: Progress) -> Iterator[None]:
    """A mistake met inside is the only thing left to read: the bars go."""
    try:
        yield
    except UserError:
        progress.live.transient = True
        progress.console.quiet = not progress.console.is_terminal  # else it ends with an empty line
        raise


def _documents(
    args: argparse.Namespace, files: list[Input], counts: dict[str, int], advance: Callable[[int], None]
) -> Iterator[Document]:
    """The documents that are not empty."""
    for file in files:
        try:
            for document in read.documents(file, args.text_field, advance):
                if document.text:
                    yield document
                else:
                    counts["empty_documents"] += 1
        except read.Undecodable:
            if not args.skip_undecodable:
                raise
            counts["skipped_files"] += 1
            advance(file.bytes)
        counts["files"] += 1


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    args: argparse.Namespace,
    corpus: Corpus,
    using: Encoder,
    text: str,
    settings: dict[str, Any],
    progress: Progress,
) -> Manifest:
    output, order, held_out = Path(args.output), corpus.order(), corpus.held_out(args.held_out)
    if held_out.all():
        raise UserError(f"--held-out: {args.held_out} leaves none of {len(order)} documents for training; lower it")
    occurrences = np.zeros(using.vocab, np.int64)
    task = progress.add_task("writing", total=len(order))

    def watched(split: str) -> Iterator[np.ndarray]:
        for document in corpus.documents(order[held_out[order] == (split == "validation")]):
            if split == "train":
                np.add.at(occurrences, document, 1)
            progress.advance(task)
            yield document

    with write.whole_file(output / manifest.TOKENIZER_FILE) as file:
        file.write(text.encode())
    sizes = {"sample_tokens": args.sample_tokens, "shard_tokens": args.shard_tokens}
    train = write.write_split(output, "train", watched("train"), **sizes)
    validation = write.write_split(output, "validation", watched("validation"), **sizes)
    finished = Manifest(
        dtype=manifest.dtype_of(using.vocab),
        sample_tokens=args.sample_tokens,
        vocab=using.vocab,
        eos_token=args.eos,
        eos_id=using.eos_id,
        tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
        unigram_entropy_nats=_entropy_nats(occurrences),
        counts=corpus.counts | {"documents": len(order), "tokens": train.tokens + validation.tokens},
        settings=settings,
        train=train,
        validation=validation,
    )
    with write.whole_file(output / manifest.FILE) as file:
        file.write(manifest.dump(finished).encode())
    return finished


def _entropy_nats(occurrences: np.ndarray) -> float:
    shares = occurrences[occurrences > 0] / occurrences.sum()
    # Rounded, since the order of a sum, and so its last bits, may differ between processors.
    return round(float(-(shares * np.log(shares)).sum()), 6)


def _settings(args: argparse.Namespace, files: list[Input], given: str | None) -> dict[str, Any]:
    """Everything the bytes of the result depend on."""
    trained = f"bpe of {_vocab(args)}"
    return {
        "inputs_sha256": read.fingerprint(files),
        "num_input_files": len(files),
        "tokenizer": trained if given is None else hashlib.sha256(given.encode()).hexdigest(),
        "eos": args.eos,
        "text_field": args.text_field,
        "held_out": args.held_out,
        "seed": args.seed,
        "skip_undecodable": args.skip_undecodable,
        "sample_tokens": args.sample_tokens,
        "shard_tokens": args.shard_tokens,
    }


def _vocab(args: argparse.Namespace) -> int:
    return ORDINARY_VOCAB if args.vocab is None else int(args.vocab)


def _check_arguments(args: argparse.Namespace) -> None:
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out: {args.held_out}; must be at least 0 and below 1; 0.005 keeps one document in 200")
    for name in ("workers", "shard_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)}; must be positive; change it")
    if args.sample_tokens < 1 or args.sample_tokens % manifest.TAR_BLOCK_BYTES:
        raise UserError(
            f"--sample-tokens: {args.sample_tokens}; must be a multiple of {manifest.TAR_BLOCK_BYTES}; change it"
        )


def _print_counts(output: Path, corpus: Manifest) -> None:
    print(
        f"{output}: {corpus.counts['documents']:,} documents, {corpus.counts['tokens']:,} tokens, "
        f"vocab {corpus.vocab:,}"
    )
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        print(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards")
    for name in ("empty_documents", "skipped_files"):
        if corpus.counts[name]:
            print(f"  {name.replace('_', ' ')} left out: {corpus.counts[name]:,}")
    print(f"  unigram entropy of the training tokens: {corpus.unigram_entropy_nats:.4f} nats")
    if not corpus.validation.tokens:
        print("  no document was held out; a larger --held-out gives validation tokens")
