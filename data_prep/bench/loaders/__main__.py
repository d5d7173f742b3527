"""The command line: `python -m tandem.data_prep.bench.loaders [contestant ...]`."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tandem.data_prep.bench.loaders.adapters import CONTESTANTS
from tandem.data_prep.bench.loaders.comparison import Refused, Row, compare
from tandem.data_prep.bench.loaders.synthetic_corpus import UNIT_TOKENS, Corpus
from tandem.data_prep.bench.options import check_places, number
from tandem.trainer.config import UserError

HEAD = ["Mtok/s", "1 worker", "B/token", "resume s", "peak MiB"]


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where what is asked for cannot be, 1 where ours could not be measured, each with one line that says why."""
    options = _options(arguments)
    try:
        _check(options)
        with _folder(options.folder) as folder:
            corpus = Corpus(folder, options.tokens // UNIT_TOKENS * UNIT_TOKENS, options.seed)
            rows = compare(options.contestant or list(CONTESTANTS), corpus, options.rounds, options.seconds)
    except (UserError, Refused) as error:
        print(f"tandem.data_prep.bench.loaders: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(*_table(rows), sep="\n")
    if options.json is not None:
        with options.json.open("a") as out:
            out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tandem.data_prep.bench.loaders", description="Our loader beside others, on the same tokens."
    )
    add = parser.add_argument
    add("contestant", nargs="*", help=f"all where none is named: {'; '.join(CONTESTANTS)}")
    add(
        "--tokens",
        type=int,
        default=100_000_000,
        help="of the corpus, less what is no whole step of it (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="of tokens and orders (default %(default)s)")
    add("--rounds", type=int, default=3, help="whose median counts (default %(default)s)")
    add("--seconds", type=float, default=10.0, help="after which a pass is cut short (default %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="keeps the corpus and its forms (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="file that every row is added to, a line each")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    for name in options.contestant:
        if name not in CONTESTANTS:
            raise UserError(f"contestant: {name!r}; not known; one of {'; '.join(CONTESTANTS)}")
    for option, least in (("tokens", UNIT_TOKENS), ("rounds", 1), ("seconds", 0.0), ("seed", 0)):
        if (value := getattr(options, option)) < least:
            raise UserError(f"--{option}: {value}; at least {least}; raise it")
    check_places(options)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="loaders-") as folder:
        yield Path(folder)


def _table(rows: list[Row]) -> Iterator[str]:
    yield _line("contestant", HEAD, "same ranks", "2 -> 3 ranks", "")
    for row in rows:
        rates = [number(rate and rate / 1e6, 1) for rate in (row.tokens_per_second, row.worker_tokens_per_second)]
        peak = number(row.peak_bytes and row.peak_bytes / 2**20, 0)
        numbers = [*rates, number(row.bytes_per_token, 3), number(row.resume_seconds, 3), peak]
        yield _line(row.contestant, numbers, row.same_ranks, row.other_ranks, row.note)


def _line(name: str, numbers: list[str], same: str, other: str, note: str) -> str:
    words = [name.ljust(26), *(number.rjust(9) for number in numbers), " ", same.ljust(14), other.ljust(14), note]
    return " ".join(words).rstrip()


if __name__ == "__main__":
    # Said of mosaicml-streaming, at the end, by a process that Python starts beside ours.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    sys.exit(main())
