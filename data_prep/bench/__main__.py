"""The command line: `python -m tandem.data_prep.bench [way ...]`."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tandem.data_prep.bench.comparison import Failed, Row, rows
from tandem.data_prep.bench.options import check_places, number
from tandem.data_prep.bench.pipelines import WAYS
from tandem.data_prep.bench.text_files import Text, documents, gathered, machine
from tandem.data_prep.bench.tokenizer_libraries import EOS
from tandem.data_prep.tokenizers import build
from tandem.trainer.config import UserError

VOCAB = 16_384
SAMPLE_DOCUMENTS = 1_000
"""That a tokenizer is trained on where none is given."""
HEAD = ["MB", "s", "MB/s", "CPU s", "MB/CPU s", "peak MiB", "differ", "of"]


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where what is asked for cannot be, 1 where ours failed or its ids differ, each with one line that says why."""
    options = _options(arguments)
    try:
        _check(options)
        with ExitStack() as stack:
            return _compare(options, stack)
    except (UserError, Failed) as error:
        print(f"tandem.data_prep.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tandem.data_prep.bench", description="tandem prepare beside others, on the same text."
    )
    add = parser.add_argument
    add("way", nargs="*", help=f"all where none is named: {'; '.join(WAYS)}")
    add("--input", nargs="+", type=Path, metavar="DIR", help="folders of text (default: this Python's libraries)")
    add("--mb", type=float, default=200.0, help="of text that ours reads (default %(default)s)")
    add("--rival-mb", type=float, default=32.0, help="of it that rivals read, file by file (default %(default)s)")
    forms = "tokenizer.json, or what else tandem prepare takes, that splits text as GPT-2's"
    add("--tokenizer", metavar="FILE", help=f"{forms} (default: one of {VOCAB} ids, trained on the text)")
    add("--workers", type=int, default=1, metavar="N", help="processes of each (default %(default)s)")
    add("--rounds", type=int, default=3, help="whose median counts (default %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="keeps the text (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="file that every row is added to, a line each")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    for name in options.way:
        if name not in WAYS:
            raise UserError(f"way: {name!r}; not known; one of {'; '.join(WAYS)}")
    for option in ("mb", "rival_mb", "workers", "rounds"):
        if (value := getattr(options, option)) <= 0:
            raise UserError(f"--{option.replace('_', '-')}: {value}; above 0; raise it")
    for path in options.input or ():
        if not path.is_dir():
            raise UserError(f"--input: {path}; is no folder; name one with text")
    check_places(options)


def _compare(options: argparse.Namespace, stack: ExitStack) -> int:
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prepare-")))
    text = gathered((options.folder or work / "text").absolute(), options.input or machine(), options.mb)
    share = text.share(options.rival_mb, work / "share")
    tokenizer = work / build.FILE
    tokenizer.write_text(_tokenizer(options.tokenizer, text))
    print(f"{sum(text.bytes) / 1e6:.0f} MB of text, {sum(text.documents):,} documents, {options.workers} workers")
    print(_line("way", "", HEAD, ""))
    differ = 0
    ways = options.way or list(WAYS)
    for row in rows(ways, text, share, tokenizer, work, options.workers, options.rounds):
        print(_table_line(row), flush=True)
        if options.json is not None:
            with options.json.open("a") as out:
                out.write(json.dumps(asdict(row)) + "\n")
        differ += 0 if WAYS[row.way].rival else row.differing_documents or 0
    if differ:
        raise Failed(f"ids of {differ:,} documents differ from the reference's")
    return 0


def _tokenizer(given: str | None, text: Text) -> str:
    if given is not None:
        return build.read(given)
    sample: Iterator[str] = islice(documents(text.paths), SAMPLE_DOCUMENTS)
    return build.train(sample, VOCAB, EOS)


def _table_line(row: Row) -> str:
    megabytes = [
        None if value is None else value / 1e6
        for value in (row.text_bytes or None, row.bytes_per_second, row.bytes_per_cpu_second)
    ]
    numbers = [number(megabytes[0], 0), number(row.seconds, 1), number(megabytes[1], 1)]
    numbers += [
        number(row.cpu_seconds, 1),
        number(megabytes[2], 1),
        number(row.peak_bytes and row.peak_bytes / 2**20, 0),
    ]
    numbers += [number(row.differing_documents, 0), number(row.compared_documents, 0)]
    return _line(row.way, row.part, numbers, row.note)


def _line(way: str, part: str, numbers: list[str], note: str) -> str:
    return " ".join([way.ljust(22), part.ljust(10), *(number.rjust(8) for number in numbers), " ", note]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
