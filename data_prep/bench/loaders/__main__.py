"""The command line: `python -m tandem.data_prep.bench.loaders [loader ...]`."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tandem.data_prep.bench.loaders.adapters import ADAPTERS
from tandem.data_prep.bench.loaders.comparison import LoaderResult, MeasurementFailed, compare_loaders
from tandem.data_prep.bench.loaders.synthetic_corpus import CORPUS_MULTIPLE_TOKENS, SyntheticCorpus
from tandem.data_prep.bench.options import check_output_paths, format_number
from tandem.trainer.config import UserError

TABLE_HEADER = ["Mtok/s", "1 worker", "B/token", "resume s", "peak MiB"]


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where what is asked for cannot be, 1 where ours could not be measured, each with one line that says why."""
    options = _parse_options(arguments)
    try:
        _check_options(options)
        with _corpus_folder(options.folder) as folder:
            corpus = SyntheticCorpus(
                folder, options.tokens // CORPUS_MULTIPLE_TOKENS * CORPUS_MULTIPLE_TOKENS, options.seed
            )
            rows = compare_loaders(options.loader or list(ADAPTERS), corpus, options.rounds, options.seconds)
    except (UserError, MeasurementFailed) as error:
        print(f"tandem.data_prep.bench.loaders: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(*_table_lines(rows), sep="\n")
    if options.json is not None:
        with options.json.open("a") as out:
            out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    return 0


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tandem.data_prep.bench.loaders", description="Our loader beside others, on the same tokens."
    )
    add = parser.add_argument
    add("loader", nargs="*", help=f"all where none is named: {'; '.join(ADAPTERS)}")
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


def _check_options(options: argparse.Namespace) -> None:
    for name in options.loader:
        if name not in ADAPTERS:
            raise UserError(f"loader: {name!r}; not known; one of {'; '.join(ADAPTERS)}")
    for option, least in (("tokens", CORPUS_MULTIPLE_TOKENS), ("rounds", 1), ("seconds", 0.0), ("seed", 0)):
        if (value := getattr(options, option)) < least:
            raise UserError(f"--{option}: {value}; at least {least}; raise it")
    check_output_paths(options)


@contextmanager
def _corpus_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="loaders-") as folder:
        yield Path(folder)


def _table_lines(rows: list[LoaderResult]) -> Iterator[str]:
    yield _format_line("loader", TABLE_HEADER, "same ranks", "2 -> 3 ranks", "")
    for row in rows:
        rates = [
            format_number(rate and rate / 1e6, 1) for rate in (row.tokens_per_second, row.worker_tokens_per_second)
        ]
        peak = format_number(row.peak_bytes and row.peak_bytes / 2**20, 0)
        numbers = [*rates, format_number(row.bytes_per_token, 3), format_number(row.resume_seconds, 3), peak]
        yield _format_line(row.loader, numbers, row.same_ranks, row.other_ranks, row.note)


def _format_line(name: str, numbers: list[str], same: str, other: str, note: str) -> str:
    words = [name.ljust(26), *(number.rjust(9) for number in numbers), " ", same.ljust(14), other.ljust(14), note]
    return " ".join(words).rstrip()


if __name__ == "__main__":
    # Said of mosaicml-streaming, at the end, by a process that Python starts beside ours.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    sys.exit(main())
