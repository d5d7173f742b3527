"""`tandem inspect`: what a prepared corpus is, or the text of a row, of a range of a shard, of documents.

Rows are those of the stored order, shard after shard, each of a length that is asked for; a run reads the same tokens in
an order of its own, and `tandem audit` says which range of which shard a step was fed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.text import Text

from tandem.data_prep import corpus_statistics
from tandem.data_prep.corpus_reader import Corpus, Piece
from tandem.data_prep.vocabulary import visible
from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import Shard, Split
from tandem.trainer.metrics import progress

EXCERPT_CHARACTERS = 200
"""Shown of a document on either side of what was looked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tandem inspect`."""
    add = parser.add_argument
    add("corpus", metavar="DIR", help="folder written by tandem prepare, or its address: s3://, gs://, https://")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", type=int, metavar="N", help="show a row of the stored order, counted from 0")
    what.add_argument("--document", type=int, metavar="N", help="show a document of the stored order, counted from 0")
    what.add_argument("--shard", metavar="FILE", help="show a range of a shard; see --tokens")
    what.add_argument("--find", metavar="TEXT", help="show the first documents that contain the text")
    add("--split", choices=("train", "validation"), default="train", help="of rows and documents (default %(default)s)")
    add("--seq-len", type=int, default=2048, metavar="L", help="tokens in a row (default %(default)s)")
    add("--tokens", metavar="FIRST:END", help="of --shard, or FIRST+COUNT (default: a row from its beginning)")
    add("--limit", type=int, default=5, metavar="N", help="documents to find at most (default %(default)s)")
    scanned = "shards to count lengths in, or all (default %(default)s: documents are shuffled, some speak for all)"
    add("--sample", default="16", metavar="N", help=scanned)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """What was asked for is printed.

    Raises: UserError where there is no such thing, or the corpus is damaged.
    """
    _check_arguments(args)
    corpus = Corpus(args.corpus)
    console = Console(highlight=False, markup=False, emoji=False)
    if args.row is not None or args.document is not None or args.shard is not None:
        title, split, start, count = _range(args, corpus)
        pieces = list(corpus.pieces(getattr(corpus.manifest, split), start, count))
        if args.json:
            print(json.dumps({"corpus": args.corpus, "split": split, "first": start, "tokens": count,
                              "documents": [_described(piece, corpus) for piece in pieces]}))  # fmt: skip
        else:
            _show(title, split, pieces, corpus, console)
    elif args.find is not None:
        _find(args, corpus, console)
    else:
        _survey(args, corpus, console)


def _range(args: argparse.Namespace, corpus: Corpus) -> tuple[str, str, int, int]:
    """Title, split, first token and tokens of what was asked for."""
    if args.shard is not None:
        return _shard_range(args, corpus)
    split: Split = getattr(corpus.manifest, args.split)
    if args.document is not None:
        _check_number("--document", args.document, split.documents, f"{args.split} has {split.documents:,} documents")
        start, count = corpus.place_of(split, args.document)
        return f"{args.split} document {args.document:,} of {split.documents:,}", args.split, start, count
    rows = -(-split.tokens // args.seq_len)
    _check_number("--row", args.row, rows, f"{args.split} has {rows:,} rows of {args.seq_len:,} tokens")
    start = args.row * args.seq_len
    count = min(args.seq_len, split.tokens - start)
    return f"{args.split} row {args.row:,} of {rows:,}", args.split, start, count


def _shard_range(args: argparse.Namespace, corpus: Corpus) -> tuple[str, str, int, int]:
    for name in ("train", "validation"):
        before = 0
        for shard in getattr(corpus.manifest, name).shards:
            if shard.file == PurePath(args.shard).name:
                first, end = _tokens(args, shard)
                return f"{shard.file} tokens {first}:{end}", name, before + first, end - first
            before += shard.tokens
    names = [shard.file for shard in corpus.shards]
    raise UserError(f"--shard: {args.shard}; {args.corpus} has {len(names):,}: {names[0]} to {names[-1]}; name one")


def _tokens(args: argparse.Namespace, shard: Shard) -> tuple[int, int]:
    if args.tokens is None:
        return 0, min(args.seq_len, shard.tokens)
    found = re.fullmatch(r"(\d+)([:+])(\d+)", args.tokens, re.ASCII)
    first, end = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == "+":
        end += first
    if not first < end <= shard.tokens:
        raise UserError(
            f"--tokens: {args.tokens}; must be FIRST:END or FIRST+COUNT, not empty, within the {shard.tokens} tokens of "
            f"{shard.file}; for example 0:{min(args.seq_len, shard.tokens)}"
        )
    return first, end


def _check_number(option: str, value: int, count: int, there_are: str) -> None:
    if not 0 <= value < count:
        remedy = f"name one from 0 to {count - 1:,}" if count else "see the other --split"
        raise UserError(f"{option}: {value}; {there_are}; {remedy}")


def _show(title: str, split: str, pieces: list[Piece], corpus: Corpus, console: Console) -> None:
    tokens = sum(len(piece.tokens) for piece in pieces)
    console.print(
        f"{title}: {tokens:,} tokens, {len(pieces):,} documents, whole or in part", style="bold", soft_wrap=True
    )
    for number, piece in enumerate(pieces):
        _rule(f"{number}: {_described_place(piece, split)}", console)
        console.print(corpus.vocabulary.shown(piece.tokens), overflow="fold")
    _rule("", console)


def _described_place(piece: Piece, split: str) -> str:
    place = f"{piece.shard} {piece.first}:{piece.first + len(piece.tokens)}"
    parts = [f"{split} document {piece.document}", place, f"{piece.length:,} tokens"]
    if piece.before:
        parts.append(f"began {piece.before:,} before")
    if piece.after:
        parts.append(f"goes on for {piece.after:,}")
    return ", ".join(parts)


def _rule(title: str, console: Console) -> None:
    # Not rich's own, which cuts a title that is too long.
    line = f"── {title} " if title else ""
    console.print(Text(line.ljust(console.width, "─"), "dim"), soft_wrap=True)


def _described(piece: Piece, corpus: Corpus) -> dict[str, Any]:
    return {
        "document": piece.document, "shard": piece.shard, "first": piece.first, "length": piece.length,
        "before": piece.before, "after": piece.after,
        "text": corpus.vocabulary.text(piece.tokens), "tokens": piece.tokens.tolist(),
    }  # fmt: skip


def _find(args: argparse.Namespace, corpus: Corpus, console: Console) -> None:
    split: Split = getattr(corpus.manifest, args.split)
    with progress.shown("looking", sum(shard.bytes for shard in split.shards), "bytes") as advance:
        found = list(islice(_containing(args.find, corpus, split, advance), args.limit))
    if args.json:
        documents = [_described(piece, corpus) for piece, _ in found]
        print(json.dumps({"corpus": args.corpus, "split": args.split, "find": args.find, "documents": documents}))
        return
    for piece, text in found:
        _rule(_described_place(piece, args.split), console)
        console.print(_excerpt(text, args.find), overflow="fold")
    if not found:
        print(f"{args.corpus}: no document of {args.split} contains {args.find!r}")


def _containing(text: str, corpus: Corpus, split: Split, advance: Callable[[int], None]) -> Iterator[tuple[Piece, str]]:
    first_token = 0
    for shard in split.shards:
        for piece in corpus.pieces(split, first_token, shard.tokens):
            document = corpus.vocabulary.text(piece.tokens[:-1])
            if text in document:
                yield piece, document
        first_token += shard.tokens
        advance(shard.bytes)


def _excerpt(text: str, found: str) -> Text:
    begin = text.index(found)
    end = begin + len(found)
    left, right = text[max(begin - EXCERPT_CHARACTERS, 0) : begin], text[end : end + EXCERPT_CHARACTERS]
    before, after = "…" * (begin > EXCERPT_CHARACTERS), "…" * (len(text) > end + EXCERPT_CHARACTERS)
    return Text.assemble(before, visible(left), (visible(found), "bold reverse"), visible(right), after)


def _survey(args: argparse.Namespace, corpus: Corpus, console: Console) -> None:
    shards = corpus.shards
    scanned = corpus_statistics.spread(shards, len(shards) if args.sample == "all" else int(args.sample))
    with progress.shown("counting lengths", sum(shard.bytes for shard in scanned), "bytes") as advance:
        known = corpus_statistics.facts(corpus, scanned, corpus_statistics.scan(corpus, scanned, advance))
    if args.json:
        print(json.dumps(known))
    else:
        corpus_statistics.show(known, console)


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ("seq_len", "limit"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)}; must be positive; change it")
    if args.tokens is not None and args.shard is None:
        raise UserError(f"--tokens: {args.tokens}; is a range of a shard; name the shard with --shard FILE")
    if args.find == "":
        raise UserError("--find: is empty, which every document contains; give a text")
    if args.sample != "all" and not (args.sample.isdecimal() and int(args.sample)):
        raise UserError(f"--sample: {args.sample}; must be a positive number of shards, or all; change it")
