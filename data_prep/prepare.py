"""`tandem prepare`: text in; shards, tokenizer.json and manifest.json out, the same bytes every time.

Inputs are cut into units, units are encoded into spills by workers that share nothing, and shards are gathered from the
spills in the order of a hash of seed, place and text. Every unit and every shard is finished or not there, and none
depends on who made it; so neither the number of workers nor a kill in between can show in the result. The manifest is
written last.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tandem.data_prep import clean, cluster, encode, executor, output_folder, readers, stages
from tandem.data_prep.clean import Rules
from tandem.data_prep.cluster import submissions
from tandem.data_prep.cluster.stage_job import Request
from tandem.data_prep.cluster.submissions import OURS
from tandem.data_prep.input_files import Input, Part, listed
from tandem.data_prep.settings import Settings
from tandem.data_prep.tokenizers import build, encoding
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import Manifest
from tandem.trainer.metrics import progress

ORDINARY_VOCAB = 16_384
ORDINARY_TASKS = 64
SHOWN_FAILURES = 5
MOST_SEEDS = 1 << 63
"""On each side of zero."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem prepare`."""
    add = parser.add_argument
    kinds = "folders or files, local or s3://, gs://, https://: text, code, .jsonl[.gz|.zst], .parquet"
    add("--input", nargs="+", required=True, metavar="PATH", help=kinds)
    add("--output", required=True, metavar="DIR", help="folder to create")
    choice = parser.add_mutually_exclusive_group()
    forms = "tokenizer.json, a folder with vocab.json and merges.txt, or a .tiktoken file, to encode with"
    choice.add_argument("--tokenizer", metavar="FILE", help=forms)
    trained = f"ids of a byte-level BPE trained on the corpus (default {ORDINARY_VOCAB})"
    choice.add_argument("--vocab", type=int, metavar="N", help=trained)
    add("--tokenizer-kind", choices=build.KINDS, help="of a .tiktoken file that does not have its usual name")
    libraries = "what encodes; it does not show in the result (default %(default)s: the fastest that is exact)"
    add("--tokenizer-library", choices=encoding.LIBRARIES, default="auto", help=libraries)
    add("--eos", default="<|endoftext|>", metavar="TOKEN", help="ends each document (default %(default)s)")
    add("--text-field", default="text", metavar="NAME", help="of jsonl and parquet (default %(default)s)")
    add("--group-field", metavar="NAME", help="count documents and tokens by this field: meta.redpajama_set_name")
    add("--where", metavar="NAME=VALUE", help="take only documents with this value of a field")
    add("--glob", metavar="PATTERN", help="files to take from folders, instead of known suffixes")
    add("--nfc", action="store_true", help="bring text to Unicode's composed form")
    add("--min-characters", type=int, default=0, metavar="N",
        help="leave out documents with fewer characters other than ASCII punctuation and whitespace "
        f"({clean.SHORTEST} in SlimPajama; default: none)")  # fmt: skip
    add("--deduplicate", action="store_true", help="keep one of documents that share 0.8 of their 13-grams")
    add("--decontaminate", nargs="+", default=[], metavar="PATH", help="leave out documents that are also here")
    kept = "share of documents kept for validation (default %(default)s)"
    add("--held-out", type=float, default=0.005, metavar="FRACTION", help=kept)
    add("--skip-undecodable", action="store_true", help="leave out, and count, text files that are not UTF-8")
    add("--workers", type=int, metavar="N", help="processes at once (default: cores; with slurm and ray, no limit)")
    where = "where they work: this machine, jobs of Slurm, tasks of Ray (default %(default)s)"
    add("--executor", choices=("local", *cluster.LIBRARIES), default="local", help=where)
    add("--tasks", type=int, metavar="N", help=f"of Slurm, in a stage (default {ORDINARY_TASKS})")
    add("--slurm", nargs="+", metavar="NAME=VALUE", help="options of sbatch: partition=cpu time=1-0 mem-per-cpu=4G")
    add("--seed", type=int, default=0, help="of the shuffle (default %(default)s)")
    size = "tokens in a %s (default %%(default)s)"
    add("--sample-tokens", type=int, default=65_536, metavar="N", help=size % "tar sample")
    add("--shard-tokens", type=int, default=1 << 25, metavar="N", help=size % "shard, at least")


def run(args: argparse.Namespace) -> None:
    """DIR is a finished corpus of these inputs and settings; one that already was is left as it is.

    Raises: UserError; then nothing is left behind that was not there before, but finished units of work.
    """
    _check_arguments(args)
    output, console = Path(args.output), Console(stderr=True)
    given = build.read(args.tokenizer, args.tokenizer_kind) if args.tokenizer else None
    if given is not None:
        encoding.encoder(given, args.eos, args.tokenizer, library="tokenizers")
    try:
        _run(args, output, given, console)
    except KeyboardInterrupt:
        kept = f"finished work is kept in {output}; " if (output / output_folder.WORK).is_dir() else ""
        raise KeyboardInterrupt(f"{kept}the same command goes on") from None


def _run(args: argparse.Namespace, output: Path, given: str | None, console: Console) -> None:
    inputs = listed(args.input, args.glob, output)
    settings = _settings(args, given)
    if output_folder.is_finished(output, settings.identity(), inputs):
        print(f"{output}: already prepared with these settings; nothing to do")
        return
    with output_folder.claimed(output, settings.identity(), partial(submissions.refuse_running, output)):
        if output_folder.is_finished(output, settings.identity(), inputs):
            print(f"{output}: was prepared meanwhile with these settings; nothing to do")
            return
        if args.executor == "slurm":
            _submit(args, inputs, given, settings)
            return
        corpus = _prepare(args, inputs, given, settings, console)
    _print_counts(output, corpus)


def _prepare(
    args: argparse.Namespace, inputs: list[Input], given: str | None, settings: Settings, console: Console
) -> Manifest:
    with progress.bars(console, "share") as bars, _alone_on_screen(bars):
        shown = partial(progress.added, bars)
        prepared = stages.begin(
            Path(args.output), settings, inputs, given,
            vocab=_vocab(args), library=args.tokenizer_library, shown=shown,
        )  # fmt: skip
        return stages.run(prepared, _runner(args), shown)


def _runner(args: argparse.Namespace) -> stages.Run:
    if args.executor == "ray":
        return partial(cluster.door("ray").run, workers=args.workers)
    return partial(executor.run, workers=args.workers or len(os.sched_getaffinity(0)))


def _submit(args: argparse.Namespace, inputs: list[Input], given: str | None, settings: Settings) -> None:
    output = Path(args.output).resolve()
    if before := submissions.last(output):
        print(f"{args.output}: the jobs of the last submission have ended and are not done; logs: {before.logs}")
        for line in before.failures()[:SHOWN_FAILURES]:
            print(f"  {line}")
    submitted = cluster.door("slurm").submit(
        Request(output, settings, inputs, given, _vocab(args), args.tokenizer_library),
        tasks=args.tasks or ORDINARY_TASKS,
        workers=args.workers,
        options=dict(option.split("=", 1) for option in args.slurm or []),
    )
    print(f"{args.output}: submitted to Slurm, each job to begin when the one before has ended well")
    for stage, job in submitted.jobs.items():
        print(f"  {stage}: job {job}")
    print("  the same command says how far they are, and submits again what has failed")
    print(f"  logs, and one line for each task that failed: {submitted.logs}")


@contextmanager
def _alone_on_screen(bars: Progress) -> Iterator[None]:
    """A mistake met inside is the only thing left to read: the bars go."""
    try:
        yield
    except UserError:
        bars.live.transient = True
        bars.console.quiet = not bars.console.is_terminal  # else it ends with an empty line
        raise


def _settings(args: argparse.Namespace, given: str | None) -> Settings:
    name, _, value = (args.where or "").partition("=")
    contaminants = _contaminants(args.decontaminate, args.text_field) if args.decontaminate else frozenset()
    return Settings(
        text_field=args.text_field,
        group_field=args.group_field,
        where=(name, value) if args.where else None,
        skip_undecodable=args.skip_undecodable,
        cleaning=Rules(nfc=args.nfc, shortest=args.min_characters, contaminants=contaminants),
        deduplicate=args.deduplicate,
        tokenizer=f"bpe of {_vocab(args)}" if given is None else hashlib.sha256(given.encode()).hexdigest(),
        eos=args.eos,
        held_out=args.held_out,
        seed=args.seed,
        sample_tokens=args.sample_tokens,
        shard_tokens=args.shard_tokens,
    )


def _contaminants(paths: list[str], text_field: str) -> frozenset[bytes]:
    parts = (Part(file, 0, 1) for file in listed(paths, None, Path(os.devnull), "--decontaminate"))
    texts = (
        document.text for part in parts for document in readers.documents(part, text_field, [], lambda count: None)
    )
    return clean.keys(texts)


def _vocab(args: argparse.Namespace) -> int:
    return ORDINARY_VOCAB if args.vocab is None else int(args.vocab)


def _check_arguments(args: argparse.Namespace) -> None:
    if remote_files.is_remote(args.output):
        raise UserError(f"--output: {args.output}; must be a local folder; prepare in one, then copy it there")
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out: {args.held_out}; must be at least 0 and below 1; 0.005 keeps one document in 200")
    for name in ("workers", "tasks", "shard_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)}; must be positive; change it")
    if args.min_characters < 0:
        raise UserError(f"--min-characters: {args.min_characters}; must not be negative; 0 leaves none out")
    _check_executor(args)
    if not -MOST_SEEDS <= args.seed < MOST_SEEDS:
        raise UserError(f"--seed: {args.seed}; must be a number of 64 bits with its sign; choose a smaller one")
    _check_fields(args)
    if args.sample_tokens < 1 or args.sample_tokens % manifest.TAR_BLOCK_BYTES:
        raise UserError(
            f"--sample-tokens: {args.sample_tokens}; must be a multiple of {manifest.TAR_BLOCK_BYTES}; change it"
        )


def _check_fields(args: argparse.Namespace) -> None:
    name, equals, _ = (args.where or "").partition("=")
    if args.where is not None and not (name and equals):
        raise UserError(f"--where: {args.where!r}; must read NAME=VALUE; for example meta.language=en")
    for option, field in (("--where", name), ("--group-field", args.group_field or "")):
        if field.split(".")[0] == args.text_field:
            raise UserError(f"{option}: {field} is the text itself; must be another field of the record; name that")


def _check_executor(args: argparse.Namespace) -> None:
    for name in ("tasks", "slurm"):
        if getattr(args, name) is not None and args.executor != "slurm":
            raise UserError(
                f"--{name}: is for --executor slurm, not {args.executor}; leave it out, or name that executor"
            )
    for option in args.slurm or []:
        name = option.partition("=")[0]
        if "=" not in option or name.startswith("-") or name in OURS:
            raise UserError(
                f"--slurm: {option}; must read NAME=VALUE, without dashes, not of {', '.join(OURS)}; change it"
            )
    if args.executor != "local":
        cluster.door(args.executor)


def _print_counts(output: Path, corpus: Manifest) -> None:
    print(
        f"{output}: {corpus.counts['documents']:,} documents, {corpus.counts['tokens']:,} tokens, "
        f"vocab {corpus.vocab:,}"
    )
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        print(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards")
    for name in stages.LEFT_OUT:
        if corpus.counts.get(name):
            print(f"  {name.replace('_', ' ')} left out: {corpus.counts[name]:,}")
    for group, counts in corpus.groups.items():
        print(f"  {group or '(none)'}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    if [*corpus.groups] == [encode.NO_GROUP]:
        print(f"  no document has the field {corpus.settings['group_field']}, which --group-field names")
    print(f"  unigram entropy of the training tokens: {corpus.unigram_entropy_nats:.4f} nats")
    if corpus.settings["held_out"] and not corpus.validation.tokens:
        print("  no document was held out; a larger --held-out gives validation tokens")
