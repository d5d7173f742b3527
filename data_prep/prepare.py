"""`tandem prepare`: write shards, tokenizer.json and manifest.json from the inputs, with the same bytes every time.

This module contains the options, their checks and the printed summary; `stages` does the work. Every unit and every shard
is either finished or absent, and its bytes do not depend on the process that wrote it. Therefore neither the number of
workers nor a kill changes the result. The manifest is written last.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from tandem.data_prep import clean, cluster, encode, executor, output_folder, readers, stages, tar_reader
from tandem.data_prep.clean import CleaningRules
from tandem.data_prep.cluster import submissions
from tandem.data_prep.cluster.submissions import RESERVED_SBATCH_OPTIONS
from tandem.data_prep.formats import FORMATS
from tandem.data_prep.input_files import FilePart, Listing, list_input_files
from tandem.data_prep.settings import DROPPED_COUNT_NAMES, PrepareSettings
from tandem.data_prep.stages import PreparationRequest
from tandem.data_prep.tokenizers import build, encoding
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters, safe_print
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import CorpusManifest
from tandem.trainer.metrics import progress
from tandem.trainer.runtime.processors import usable_processors

DEFAULT_NUM_TASKS = 64
MAX_PRINTED_FAILURES = 5
TEXT_OPTIONS = (
    "group_field", "where", "nfc", "min_characters", "deduplicate", "decontaminate", "skip_undecodable", "format",
    "skip_bad_lines",
)  # fmt: skip
"""Options that cannot be combined with --tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tandem prepare`."""
    # fmt: off
    add = parser.add_argument_group("input and output").add_argument
    add("--input", nargs="+", required=True, type=os.path.expanduser, metavar="PATH",
        help="folders or files, local or s3://, gs://, https://, with braces as in bash: text, code, JSON lines (.jsonl, "
        ".ndjson, .jsonlines) and other JSON (.json), .parquet, .pq, .arrow, .feather, .ipc, webdataset .tar, .tgz; all but "
        "parquet and Arrow also with .gz, .zst, .zstd, .bz2, .xz")
    add("--output", required=True, type=os.path.expanduser, metavar="DIR", help="folder to create")
    add("--glob", metavar="PATTERN",
        help="within folders, read the files whose names match PATTERN, instead of those with known suffixes; "
        "a file whose content shows no other format is text")
    add("--format", choices=FORMATS, help="format of all files (default: by the content of each)")
    add("--skip-dangling-links", action="store_true", help="leave out and count links to files that do not exist")
    add("--text-field", default="text", metavar="NAME",
        help="field of a record that contains the text (default %(default)s); here and in the next two options, dots lead "
        "into nested records")
    add("--group-field", metavar="NAME",
        help="count documents and tokens for each value of this field, for example meta.redpajama_set_name")
    add("--where", metavar="NAME=VALUE",
        help="read only documents whose field NAME has this value; true, 5 and null are values that are not text")
    add("--skip-bad-lines", action="store_true",
        help="leave out and count records (lines, rows, members) that are not JSON, have no text or are too long; more than "
        "half of a file are an error")
    add("--skip-undecodable", action="store_true", help="leave out and count text files that are not UTF-8")

    tokenizer = parser.add_argument_group("tokenizer")
    choice, add = tokenizer.add_mutually_exclusive_group(), tokenizer.add_argument
    choice.add_argument("--tokenizer", type=os.path.expanduser, metavar="FILE",
        help="tokenizer.json, a folder with vocab.json and merges.txt, or a .tiktoken file")
    choice.add_argument("--vocab-size", type=int, default=16_384, metavar="N",
        help="train a byte-level BPE with this many ids on the corpus (default %(default)s)")
    add("--tokenizer-kind", choices=build.TIKTOKEN_KINDS,
        help="which tokenizer a .tiktoken file belongs to, if its name does not show it")
    add("--tokenizer-library", choices=encoding.LIBRARIES, default="auto",
        help="library that encodes the text; all give the same ids (default %(default)s: the fastest that supports the "
        "tokenizer)")
    add("--eos", default="<|endoftext|>", metavar="TOKEN", help="token that ends each document (default %(default)s)")

    add = parser.add_argument_group("tokenized webdataset corpora").add_argument
    add("--tokens", choices=tar_reader.TOKEN_EXTENSIONS,
        help="use token ids from tar members with this extension; --tokenizer only gives vocabulary and EOS")
    add("--padding-id", type=int, metavar="ID",
        help="id that pads samples; removed where it ends a sample after EOS, and where it fills a sample")

    add = parser.add_argument_group("cleaning").add_argument
    add("--nfc", action="store_true", help="convert text to Unicode's composed form")
    add("--min-characters", type=int, default=0, metavar="N",
        help="leave out documents with fewer characters, not counting ASCII punctuation and whitespace "
        f"(default %(default)s; SlimPajama: {clean.SLIMPAJAMA_MIN_CHARACTERS})")
    add("--deduplicate", action="store_true", help="keep one of several documents that share 0.8 of their 13-grams")
    add("--decontaminate", nargs="+", default=[], type=os.path.expanduser, metavar="PATH",
        help="leave out documents that are also in these files")

    add = parser.add_argument_group("corpus").add_argument
    add("--held-out", type=float, default=0.005, metavar="FRACTION",
        help="share of documents kept for validation (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the shuffle (default %(default)s)")
    add("--sample-tokens", type=int, default=65_536, metavar="N", help="tokens in a tar sample (default %(default)s)")
    add("--shard-tokens", type=int, default=1 << 25, metavar="N",
        help="minimum number of tokens in a shard (default %(default)s)")

    add = parser.add_argument_group("workers").add_argument
    add("--workers", type=int, metavar="N",
        help="maximum number of processes at once (default: one per core; with slurm and ray no limit)")
    add("--executor", choices=("local", *cluster.REQUIRED_LIBRARIES), default="local",
        help="run on this machine, as Slurm jobs or as Ray tasks (default %(default)s)")
    add("--tasks", type=int, metavar="N", help=f"number of Slurm tasks in a stage (default {DEFAULT_NUM_TASKS})")
    add("--slurm", nargs="+", metavar="NAME=VALUE",
        help="options of sbatch, for example partition=cpu time=1-0 mem-per-cpu=4G")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Prepare the corpus; leave a folder that already contains it unchanged.

    Raises: UserError. Then only finished units of work are left behind.
    """
    _check_arguments(args)
    output = Path(args.output)
    tokenizer_json = build.read_tokenizer(args.tokenizer, args.tokenizer_kind) if args.tokenizer else None
    if tokenizer_json is not None:
        encoding.select_encoder(tokenizer_json, args.eos, args.tokenizer, library="tokenizers")
    try:
        listing = Listing(args.skip_dangling_links)
        inputs = list_input_files(
            args.input, args.glob, output, only_tars=args.tokens is not None, text_field=args.text_field,
            file_format=args.format, listing=listing,
        )  # fmt: skip
        for note in listing.notes():
            print(f"tandem: note: {escape_control_characters(note, one_line=True)}", file=sys.stderr, flush=True)
        settings = _settings(args, tokenizer_json)
        request = PreparationRequest(
            output, settings, inputs, tokenizer_json, args.vocab_size, args.tokenizer_library, listing.dangling_links
        )
        _prepare_or_submit(args, request)
    except KeyboardInterrupt:
        kept = f"finished work is kept in {output}; " if (output / output_folder.WORK_FOLDER).is_dir() else ""
        raise KeyboardInterrupt(f"{kept}run the same command again to continue") from None


def _prepare_or_submit(args: argparse.Namespace, request: PreparationRequest) -> None:
    output, settings_dict = request.output, request.settings.to_dict()
    if output_folder.is_finished(output, settings_dict, request.inputs):
        safe_print(f"{output}: already prepared with these settings; nothing to do")
        return
    with output_folder.claim_output(output, settings_dict, partial(submissions.check_no_running_jobs, output)):
        if output_folder.is_finished(output, settings_dict, request.inputs):
            safe_print(f"{output}: another process has prepared it with these settings; nothing to do")
            return
        if args.executor == "slurm":
            _submit(args, request)
            return
        with progress.progress_display(progress.open_screen(), "share") as bars, _hide_progress_on_error(bars):
            start_progress = partial(progress.add_task, bars)
            preparation = request.create_preparation(start_progress)
            corpus_manifest = stages.run(preparation, _select_runner(args), start_progress)
    _print_counts(output, corpus_manifest)


def _select_runner(args: argparse.Namespace) -> stages.RunItems:
    if args.executor == "ray":
        return partial(cluster.executor_module("ray").run, workers=args.workers)
    return partial(executor.run, workers=args.workers or usable_processors())


def _submit(args: argparse.Namespace, request: PreparationRequest) -> None:
    request = replace(request, output=request.output.resolve())
    if last_submission := submissions.load_submission(request.output):
        safe_print(
            f"{args.output}: the jobs of the last submission have ended before the corpus was complete; "
            f"logs: {last_submission.logs}"
        )
        for line in last_submission.failure_lines()[:MAX_PRINTED_FAILURES]:
            safe_print(f"  {line}")
    submitted = cluster.executor_module("slurm").submit(
        request,
        tasks=args.tasks or DEFAULT_NUM_TASKS,
        workers=args.workers,
        options=dict(option.split("=", 1) for option in args.slurm or []),
    )
    safe_print(f"{args.output}: submitted to Slurm; each job starts when the previous one has succeeded")
    for stage, job in submitted.jobs.items():
        safe_print(f"  {stage}: job {job}")
    safe_print("  run the same command again to see their progress, and to resubmit failed jobs")
    safe_print(f"  logs, and one line for each failed task: {submitted.logs}")


@contextmanager
def _hide_progress_on_error(bars: Progress) -> Iterator[None]:
    """Remove the bars if the block raises UserError, so that only its message is left to read."""
    try:
        yield
    except UserError:
        bars.live.transient = True
        bars.console.quiet = not bars.console.is_terminal  # else it ends with an empty line
        raise


def _settings(args: argparse.Namespace, tokenizer_json: str | None) -> PrepareSettings:
    name, _, value = (args.where or "").partition("=")
    tokenizer = f"bpe of {args.vocab_size}"
    if tokenizer_json is not None:
        tokenizer = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    contaminant_keys = _contaminant_keys(args.decontaminate, args.text_field)
    converted: dict[str, Any] = {
        "where": (name, value) if args.where else None,
        "cleaning": CleaningRules(args.nfc, args.min_characters, contaminant_keys),
        "tokenizer": tokenizer,
    }
    names = {field.name for field in fields(PrepareSettings)} - converted.keys()
    return PrepareSettings(**{name: getattr(args, name) for name in names}, **converted)


def _contaminant_keys(paths: list[str], text_field: str) -> frozenset[bytes]:
    none = Path(os.devnull)
    files = list_input_files(paths, None, none, "--decontaminate", text_field=text_field) if paths else []
    read = partial(readers.read_documents, text_field=text_field, extra_fields=[], advance=lambda count: None)
    return frozenset(clean.text_key(document.text) for file in files for document in read(FilePart(file, 0, 1)))


def _check_arguments(args: argparse.Namespace) -> None:
    if remote_files.is_remote(args.output):
        raise UserError(f"--output: {args.output} is not a local folder; prepare the corpus in one, then copy it there")
    if not 0 <= args.held_out < 1:
        raise UserError(
            f"--held-out: {args.held_out} is not a share; use at least 0 and less than 1, for example 0.005 to keep one "
            "document in 200 for validation"
        )
    for name in ("workers", "tasks", "shard_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is too small; use 1 or more")
    if args.min_characters < 0:
        raise UserError(f"--min-characters: {args.min_characters} is negative; use 0 or more; 0 leaves out no document")
    _check_executor(args)
    _check_tokens(args)
    if not -(1 << 63) <= args.seed < 1 << 63:
        raise UserError(f"--seed: {args.seed} does not fit in a signed 64-bit integer; choose a number closer to 0")
    name, equals, _ = (args.where or "").partition("=")
    if args.where is not None and not (name and equals):
        raise UserError(
            f"--where: {args.where!r} does not have the form NAME=VALUE; write for example meta.language=en"
        )
    for option, field in (("--text-field", args.text_field), ("--group-field", args.group_field)):
        if field == "":
            raise UserError(f"{option}: the name is empty; name a field of the records, or leave out the option")
    for option, field in (("--where", name), ("--group-field", args.group_field or "")):
        if field == args.text_field or field.startswith(f"{args.text_field}."):
            raise UserError(f"{option}: {field} is the text itself; name another field of the record")
    if args.sample_tokens < 1 or args.sample_tokens % manifest.TAR_BLOCK_BYTES:
        raise UserError(
            f"--sample-tokens: {args.sample_tokens} is not a positive multiple of {manifest.TAR_BLOCK_BYTES}; use one, "
            "for example 65536"
        )


def _check_tokens(args: argparse.Namespace) -> None:
    if args.tokens is None:
        if args.padding_id is not None:
            raise UserError(
                f"--padding-id: {args.padding_id} has no effect without --tokens; leave it out, or add --tokens with the "
                "extension of the members that contain ids"
            )
        return
    if args.tokenizer is None:
        raise UserError(
            f"--tokens: {args.tokens} needs --tokenizer, for the vocabulary and EOS; name the tokenizer of these ids"
        )
    if args.padding_id is not None and args.padding_id < 0:
        raise UserError(f"--padding-id: {args.padding_id} is negative; give the id that pads the samples, 0 or more")
    for name in TEXT_OPTIONS:
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')}: this option needs text, but --tokens reads ids; leave one of them out"
            )


def _check_executor(args: argparse.Namespace) -> None:
    for name in ("tasks", "slurm"):
        if getattr(args, name) is not None and args.executor != "slurm":
            raise UserError(
                f"--{name}: this option has no effect with --executor {args.executor}; leave it out, or choose slurm"
            )
    for option in args.slurm or []:
        name = option.partition("=")[0]
        if "=" not in option or name.startswith("-") or name in RESERVED_SBATCH_OPTIONS:
            raise UserError(
                f"--slurm: {option} is not a valid option; write NAME=VALUE without leading dashes, for example "
                f"partition=cpu; NAME must not be one of {', '.join(RESERVED_SBATCH_OPTIONS)}, which tandem prepare sets"
            )
    if args.executor != "local":
        cluster.executor_module(args.executor)


def _print_counts(output: Path, corpus_manifest: CorpusManifest) -> None:
    safe_print(
        f"{output}: {corpus_manifest.counts['documents']:,} documents, {corpus_manifest.counts['tokens']:,} tokens, "
        f"vocab {corpus_manifest.vocab:,}"
    )
    for name, split in (("train", corpus_manifest.train), ("validation", corpus_manifest.validation)):
        safe_print(f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards):,} shards")
    for sample in corpus_manifest.settings.get(stages.BAD_RECORDS_ENTRY, ()):
        safe_print(f"  left out {sample}")
    for name in DROPPED_COUNT_NAMES:
        if corpus_manifest.counts.get(name):
            safe_print(f"  {name.replace('_', ' ')} left out: {corpus_manifest.counts[name]:,}")
    if added := corpus_manifest.counts.get("added_eos_tokens"):
        safe_print(f"  EOS added to documents that were cut at the end of a sample: {added:,}")
    if padding := corpus_manifest.counts.get("padding_tokens"):
        safe_print(f"  padding ids removed: {padding:,}")
    if unknown := corpus_manifest.counts.get("unknown_tokens"):
        share = unknown / corpus_manifest.counts["tokens"]
        safe_print(f"  tokens for text that the tokenizer does not know: {unknown:,} ({share:.2%}); that text is lost")
    if empty := corpus_manifest.counts.get("documents_without_tokens"):
        safe_print(f"  documents for whose text the tokenizer gives no token: {empty:,}; that text is lost")
    for group, counts in corpus_manifest.groups.items():
        safe_print(f"  {group or '(none)'}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    if [*corpus_manifest.groups] == [encode.NO_GROUP]:
        safe_print(f"  no document has the field {corpus_manifest.settings['group_field']} of --group-field")
    safe_print(f"  unigram entropy of the training tokens: {corpus_manifest.unigram_entropy_nats:.4f} nats")
    if corpus_manifest.settings["held_out"] and not corpus_manifest.validation.tokens:
        safe_print("  no document was held out; raise --held-out to get validation tokens")
