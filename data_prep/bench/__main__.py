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

from tandem.data_prep.bench.comparison import PipelineFailed, PipelineResult, measure_pipelines
from tandem.data_prep.bench.options import check_output_paths, format_number
from tandem.data_prep.bench.pipelines import PIPELINES
from tandem.data_prep.bench.text_files import TextFiles, gather_text, machine_sources, read_documents
from tandem.data_prep.bench.tokenizer_libraries import EOS
from tandem.data_prep.tokenizers import build
from tandem.trainer.config import UserError

VOCAB_SIZE = 16_384
SAMPLE_DOCUMENTS = 1_000
"""That a tokenizer is trained on where none is given."""
TABLE_HEADER = ["MB", "s", "MB/s", "CPU s", "MB/CPU s", "peak MiB", "differ", "of"]


def main(arguments: list[str] | None = None) -> int:
    """0; 2 where what is asked for cannot be, 1 where ours failed or its ids differ, each with one line that says why."""
    options = _parse_options(arguments)
    try:
        _check_options(options)
        with ExitStack() as stack:
            return _compare(options, stack)
    except (UserError, PipelineFailed) as error:
        print(f"tandem.data_prep.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tandem.data_prep.bench", description="tandem prepare beside others, on the same text."
    )
    add = parser.add_argument
    add("way", nargs="*", help=f"all where none is named: {'; '.join(PIPELINES)}")
    add("--input", nargs="+", type=Path, metavar="DIR", help="folders of text (default: this Python's libraries)")
    add("--mb", type=float, default=200.0, help="of text that ours reads (default %(default)s)")
    add("--rival-mb", type=float, default=32.0, help="of it that rivals read, file by file (default %(default)s)")
    forms = "tokenizer.json, or what else tandem prepare takes, that splits text as GPT-2's"
    add("--tokenizer", metavar="FILE", help=f"{forms} (default: one of {VOCAB_SIZE} ids, trained on the text)")
    add("--workers", type=int, default=1, metavar="N", help="processes of each (default %(default)s)")
    add("--rounds", type=int, default=3, help="whose median counts (default %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="keeps the text (default: a temporary one)")
    add("--json", type=Path, metavar="FILE", help="file that every row is added to, a line each")
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> None:
    for name in options.way:
        if name not in PIPELINES:
            raise UserError(f"way: {name!r}; not known; one of {'; '.join(PIPELINES)}")
    for option in ("mb", "rival_mb", "workers", "rounds"):
        if (value := getattr(options, option)) <= 0:
            raise UserError(f"--{option.replace('_', '-')}: {value}; above 0; raise it")
    for path in options.input or ():
        if not path.is_dir():
            raise UserError(f"--input: {path}; is no folder; name one with text")
    check_output_paths(options)


def _compare(options: argparse.Namespace, stack: ExitStack) -> int:
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prepare-")))
    text = gather_text((options.folder or work / "text").absolute(), options.input or machine_sources(), options.mb)
    rival_text = text.subset(options.rival_mb, work / "share")
    tokenizer = work / build.TOKENIZER_FILE
    tokenizer.write_text(_tokenizer_json(options.tokenizer, text))
    print(f"{sum(text.bytes) / 1e6:.0f} MB of text, {sum(text.documents):,} documents, {options.workers} workers")
    print(_format_line("way", "", TABLE_HEADER, ""))
    num_differing = 0
    ways = options.way or list(PIPELINES)
    for row in measure_pipelines(ways, text, rival_text, tokenizer, work, options.workers, options.rounds):
        print(_table_line(row), flush=True)
        if options.json is not None:
            with options.json.open("a") as out:
                out.write(json.dumps(asdict(row)) + "\n")
        num_differing += 0 if PIPELINES[row.pipeline].is_rival else row.differing_documents or 0
    if num_differing:
        raise PipelineFailed(f"ids of {num_differing:,} documents differ from the reference's")
    return 0


def _tokenizer_json(tokenizer_path: str | None, text: TextFiles) -> str:
    if tokenizer_path is not None:
        return build.read_tokenizer(tokenizer_path)
    sample: Iterator[str] = islice(read_documents(text.paths), SAMPLE_DOCUMENTS)
    return build.train_bpe(sample, VOCAB_SIZE, EOS)


def _table_line(row: PipelineResult) -> str:
    megabytes = [
        None if value is None else value / 1e6
        for value in (row.text_bytes or None, row.bytes_per_second, row.bytes_per_cpu_second)
    ]
    numbers = [format_number(megabytes[0], 0), format_number(row.seconds, 1), format_number(megabytes[1], 1)]
    numbers += [
        format_number(row.cpu_seconds, 1),
        format_number(megabytes[2], 1),
        format_number(row.peak_bytes and row.peak_bytes / 2**20, 0),
    ]
    numbers += [format_number(row.differing_documents, 0), format_number(row.compared_documents, 0)]
    return _format_line(row.pipeline, row.part, numbers, row.note)


def _format_line(way: str, part: str, numbers: list[str], note: str) -> str:
    return " ".join([way.ljust(22), part.ljust(10), *(number.rjust(8) for number in numbers), " ", note]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
