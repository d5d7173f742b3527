"""The command line: `python -m tests.rivals.loaders [loader ...]`."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tandem.trainer.config import UserError
from tests.rivals import options as shared_options
from tests.rivals.loaders.adapters import ADAPTERS
from tests.rivals.loaders.comparison import LoaderResult, MeasurementFailed, compare_loaders
from tests.rivals.loaders.synthetic_corpus import CORPUS_MULTIPLE_TOKENS, SyntheticCorpus
from tests.rivals.options import format_number

TABLE_HEADER = ["Mtok/s", "1 worker", "B/token", "resume s", "peak MiB"]


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 2 for a bad option; 1 if our loader could not be measured."""
    options = _parse_options(arguments)
    try:
        _check_options(options)
        tokens = options.tokens // CORPUS_MULTIPLE_TOKENS * CORPUS_MULTIPLE_TOKENS
        with tempfile.TemporaryDirectory(prefix="loaders-") as folder:
            corpus = SyntheticCorpus(Path(folder), tokens)
            rows = compare_loaders(options.loader or list(ADAPTERS), corpus, options.rounds, options.seconds)
    except (UserError, MeasurementFailed) as error:
        print(f"tests.rivals.loaders: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(*_table_lines(rows), sep="\n")
    for row in rows:
        shared_options.append_json_row(options.json, row)
    return 0


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tests.rivals.loaders", description="Our loader against others, on the same tokens."
    )
    add = parser.add_argument
    add("loader", nargs="*", help=f"any of: {'; '.join(ADAPTERS)} (default: all)")
    add("--tokens", type=int, default=100_000_000,
        help=f"size of the corpus, rounded down to a multiple of {CORPUS_MULTIPLE_TOKENS} (default %(default)s)")  # fmt: skip
    add("--rounds", type=int, default=3, help="rounds; the median is reported (default %(default)s)")
    add("--seconds", type=float, default=10.0, help="stop a throughput pass after this time (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="append every row to this file, one line of JSON each")
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> None:
    shared_options.check_names("loader", options.loader, ADAPTERS)
    shared_options.check_at_least(options, tokens=CORPUS_MULTIPLE_TOKENS, rounds=1, seconds=0)
    shared_options.check_json_path(options.json)


def _table_lines(rows: list[LoaderResult]) -> Iterator[str]:
    yield _format_line("loader", TABLE_HEADER, "same ranks", "2 -> 3 ranks", "")
    for row in rows:
        numbers = [
            format_number(row.tokens_per_second, 1, 1e6),
            format_number(row.worker_tokens_per_second, 1, 1e6),
            format_number(row.bytes_per_token, 3),
            format_number(row.resume_seconds, 3),
            format_number(row.peak_bytes, 0, 2**20),
        ]
        yield _format_line(row.loader, numbers, row.same_ranks, row.other_ranks, row.note)


def _format_line(name: str, numbers: list[str], same: str, other: str, note: str) -> str:
    cells = [name.ljust(26), *(number.rjust(9) for number in numbers), " ", same.ljust(14), other.ljust(14), note]
    return " ".join(cells).rstrip()


if __name__ == "__main__":
    # mosaicml-streaming makes Python's resource tracker warn when it exits.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    sys.exit(main())
