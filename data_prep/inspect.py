"""`tandem inspect`: statistics of a prepared corpus, or the text of a row, a range of a shard, or documents.

Rows are cut from the stored order, shard after shard. A training run reads the same tokens in another order. `tandem audit`
shows which ranges of which shards a step read.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.text import Text

from tandem.data_prep import corpus_statistics
from tandem.data_prep.corpus_reader import CorpusReader, DocumentSlice
from tandem.data_prep.vocabulary import make_visible
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import escape_control_characters, safe_print
from tandem.trainer.data.manifest import CorpusSplit, Shard
from tandem.trainer.metrics import progress

EXCERPT_CHARACTERS = 200
"""Characters shown on either side of a match."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tandem inspect`."""
    add = parser.add_argument
    add(
        "corpus",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder written by tandem prepare, or its address: s3://, gs://, https://",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", type=int, metavar="N", help="show a row of the stored order, counted from 0")
    what.add_argument("--document", type=int, metavar="N", help="show a document of the stored order, counted from 0")
    what.add_argument("--shard", metavar="FILE", help="show a range of a shard; see --tokens")
    what.add_argument("--find", metavar="TEXT", help="show the first documents that contain the text")
    add("--split", choices=("train", "validation"), default="train",
        help="the split from which --row, --document and --find read (default %(default)s)")  # fmt: skip
    add("--seq-len", type=int, default=2048, metavar="L", help="tokens in a row (default %(default)s)")
    add("--tokens", metavar="FIRST:END",
        help="range of --shard to show; FIRST+COUNT also works (default: its first row)")  # fmt: skip
    add("--limit", type=int, default=5, metavar="N", help="maximum number of documents to show (default %(default)s)")
    add("--sample", default="16", metavar="N",
        help="number of shards from which document lengths are counted, or all (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the statistics, the range or the matches.

    Raises: UserError if the range does not exist or the corpus is damaged.
    """
    _check_arguments(args)
    corpus = CorpusReader(args.corpus)
    console = Console(highlight=False, markup=False, emoji=False)
    if args.row is not None or args.document is not None or args.shard is not None:
        title, split, start, count = _requested_range(args, corpus)
        pieces = list(corpus.document_slices(getattr(corpus.manifest, split), start, count))
        if args.json:
            safe_print(json.dumps({"corpus": args.corpus, "split": split, "first": start, "tokens": count,
                              "documents": [_slice_to_dict(piece, corpus) for piece in pieces]}))  # fmt: skip
        else:
            _print_slices(title, split, pieces, corpus, console)
    elif args.find is not None:
        _print_matches(args, corpus, console)
    else:
        _print_statistics(args, corpus, console)


def _requested_range(args: argparse.Namespace, corpus: CorpusReader) -> tuple[str, str, int, int]:
    """Return title, split, first token and number of tokens of the requested range."""
    if args.shard is not None:
        return _shard_range(args, corpus)
    split: CorpusSplit = getattr(corpus.manifest, args.split)
    if args.document is not None:
        _check_index("--document", args.document, split.documents, f"{args.split} has {split.documents:,} documents")
        start, count = corpus.document_range(split, args.document)
        return f"{args.split} document {args.document:,} of {split.documents:,}", args.split, start, count
    rows = -(-split.tokens // args.seq_len)
    _check_index("--row", args.row, rows, f"{args.split} has {rows:,} rows of {args.seq_len:,} tokens")
    start = args.row * args.seq_len
    count = min(args.seq_len, split.tokens - start)
    return f"{args.split} row {args.row:,} of {rows:,}", args.split, start, count


def _shard_range(args: argparse.Namespace, corpus: CorpusReader) -> tuple[str, str, int, int]:
    for name in ("train", "validation"):
        before = 0
        for shard in getattr(corpus.manifest, name).shards:
            if shard.file == PurePath(args.shard).name:
                first, end = _parse_token_range(args, shard)
                return f"{shard.file} tokens {first}:{end}", name, before + first, end - first
            before += shard.tokens
    names = [shard.file for shard in corpus.manifest.shards]
    raise UserError(
        f"--shard: {args.shard} is not one of the {len(names):,} shards of {args.corpus}; name one of {names[0]} to {names[-1]}"
    )


def _parse_token_range(args: argparse.Namespace, shard: Shard) -> tuple[int, int]:
    if args.tokens is None:
        return 0, min(args.seq_len, shard.tokens)
    found = re.fullmatch(r"(\d+)([:+])(\d+)", args.tokens, re.ASCII)
    first, end = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == "+":
        end += first
    if not first < end <= shard.tokens:
        raise UserError(
            f"--tokens: {args.tokens} is not a range of the {shard.tokens} tokens of {shard.file}; write FIRST:END or "
            f"FIRST+COUNT with at least one token, for example 0:{min(args.seq_len, shard.tokens)}"
        )
    return first, end


def _check_index(option: str, value: int, num_items: int, availability: str) -> None:
    if not 0 <= value < num_items:
        remedy = f"use 0 to {num_items - 1:,}" if num_items else "use the other --split"
        raise UserError(f"{option}: {value} does not exist; {availability}; {remedy}")


def _print_slices(title: str, split: str, slices: list[DocumentSlice], corpus: CorpusReader, console: Console) -> None:
    tokens = sum(len(piece.tokens) for piece in slices)
    console.print(
        f"{escape_control_characters(title)}: {tokens:,} tokens, {len(slices):,} documents, whole or in part",
        style="bold",
        soft_wrap=True,
    )
    for number, piece in enumerate(slices):
        _print_rule(f"{number}: {_describe_location(piece, split)}", console)
        console.print(corpus.vocabulary.render(piece.tokens), overflow="fold")
    _print_rule("", console)


def _describe_location(document_slice: DocumentSlice, split: str) -> str:
    first = document_slice.start_token
    parts = [
        f"{split} document {document_slice.document_index}",
        f"{document_slice.shard_file} {first}:{first + len(document_slice.tokens)}",
        f"{document_slice.num_document_tokens:,} tokens",
    ]
    if document_slice.num_tokens_before:
        parts.append(f"starts {document_slice.num_tokens_before:,} earlier")
    if document_slice.num_tokens_after:
        parts.append(f"continues for {document_slice.num_tokens_after:,}")
    return ", ".join(parts)


def _print_rule(title: str, console: Console) -> None:
    # rich's own rule cuts a long title.
    line = f"── {escape_control_characters(title, one_line=True)} " if title else ""
    console.print(Text(line.ljust(console.width, "─"), "dim"), soft_wrap=True)


def _slice_to_dict(document_slice: DocumentSlice, corpus: CorpusReader) -> dict[str, Any]:
    return {
        "document": document_slice.document_index, "shard": document_slice.shard_file, "first": document_slice.start_token,
        "length": document_slice.num_document_tokens,
        "before": document_slice.num_tokens_before, "after": document_slice.num_tokens_after,
        "text": corpus.vocabulary.decode(document_slice.tokens), "tokens": document_slice.tokens.tolist(),
    }  # fmt: skip


def _print_matches(args: argparse.Namespace, corpus: CorpusReader, console: Console) -> None:
    split: CorpusSplit = getattr(corpus.manifest, args.split)
    with progress.progress_bar("searching", sum(shard.bytes for shard in split.shards), "bytes") as advance:
        found = list(islice(_find_documents(args.find, corpus, split, advance), args.limit))
    if args.json:
        documents = [_slice_to_dict(piece, corpus) for piece, _ in found]
        safe_print(json.dumps({"corpus": args.corpus, "split": args.split, "find": args.find, "documents": documents}))
        return
    for piece, text in found:
        _print_rule(_describe_location(piece, args.split), console)
        console.print(_excerpt(text, args.find), overflow="fold")
    if not found:
        safe_print(f"{args.corpus}: no document of {args.split} contains {args.find!r}")


def _find_documents(
    text: str, corpus: CorpusReader, split: CorpusSplit, advance: Callable[[int], None]
) -> Iterator[tuple[DocumentSlice, str]]:
    first_token = 0
    for shard in split.shards:
        for piece in corpus.document_slices(split, first_token, shard.tokens):
            document = corpus.vocabulary.decode(piece.tokens[:-1])
            if text in document:
                yield piece, document
        first_token += shard.tokens
        advance(shard.bytes)


def _excerpt(text: str, match_text: str) -> Text:
    begin = text.index(match_text)
    end = begin + len(match_text)
    left, right = text[max(begin - EXCERPT_CHARACTERS, 0) : begin], text[end : end + EXCERPT_CHARACTERS]
    before, after = "…" * (begin > EXCERPT_CHARACTERS), "…" * (len(text) > end + EXCERPT_CHARACTERS)
    return Text.assemble(
        before, make_visible(left), (make_visible(match_text), "bold reverse"), make_visible(right), after
    )


def _print_statistics(args: argparse.Namespace, corpus: CorpusReader, console: Console) -> None:
    shards = corpus.manifest.shards
    scanned_shards = corpus_statistics.sample_shards(shards, len(shards) if args.sample == "all" else int(args.sample))
    with progress.progress_bar("counting lengths", sum(shard.bytes for shard in scanned_shards), "bytes") as advance:
        statistics = corpus_statistics.collect_statistics(corpus, scanned_shards, advance)
    if args.json:
        safe_print(json.dumps(statistics))
    else:
        corpus_statistics.print_statistics(statistics, console)


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("seq_len", "limit"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is too small; use 1 or more")
    if args.tokens is not None and args.shard is None:
        raise UserError(f"--tokens: {args.tokens} is a range of a shard; name that shard with --shard FILE")
    if args.find == "":
        raise UserError("--find: the text is empty, and every document contains an empty text; give a text")
    if args.sample != "all" and not (args.sample.isdecimal() and int(args.sample)):
        raise UserError(f"--sample: {args.sample} is not a number of shards; use 1 or more, or all")
