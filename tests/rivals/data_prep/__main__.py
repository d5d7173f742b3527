"""The command line: `python -m tests.rivals.data_prep [pipeline ...]`."""

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

from tandem.data_prep.tokenizers import build
from tandem.trainer.config import UserError
from tests.rivals import options as shared_options
from tests.rivals.data_prep.comparison import PipelineFailed, PipelineResult, measure_pipelines
from tests.rivals.data_prep.pipelines import PIPELINES
from tests.rivals.data_prep.text_files import TextFiles, gather_text, machine_sources, read_documents
from tests.rivals.data_prep.tokenizer_libraries import EOS
from tests.rivals.options import format_number

VOCAB_SIZE, SAMPLE_DOCUMENTS = 16_384, 1_000
"""Size and training documents of the tokenizer that is trained if none is given."""
TABLE_HEADER = ["MB", "s", "MB/s", "CPU s", "MB/CPU s", "peak MiB", "differ", "of"]


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 2 for a bad option; 1 if our pipeline fails or its ids differ from the reference's."""
    options = _parse_options(arguments)
    try:
        _check_options(options)
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            return _compare(options, Path(folder))
    except (UserError, PipelineFailed) as error:
        print(f"tests.rivals.data_prep: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests.rivals.data_prep", description="tandem prepare against other pipelines.")
    add = parser.add_argument
    add("pipeline", nargs="*", help=f"any of: {'; '.join(PIPELINES)} (default: all)")
    add("--input", nargs="+", type=Path, metavar="DIR", help="folders of text (default: this Python's libraries)")
    add("--mb", type=float, default=200.0, help="text that our pipeline reads (default %(default)s)")
    add("--rival-mb", type=float, default=32.0, help="text that rivals read: the first files (default %(default)s)")
    add("--tokenizer", metavar="FILE", help="a tokenizer that tandem prepare accepts and that splits text like GPT-2's "
        f"(default: train one of {VOCAB_SIZE} ids on the text)")  # fmt: skip
    add("--workers", type=int, default=1, metavar="N", help="processes of each pipeline (default %(default)s)")
    add("--rounds", type=int, default=3, help="rounds; the median is reported (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="append every row to this file, one line of JSON each")
    return parser.parse_args(arguments)


def _check_options(options: argparse.Namespace) -> None:
    shared_options.check_names("pipeline", options.pipeline, PIPELINES)
    shared_options.check_at_least(options, mb=0.001, rival_mb=0.001, workers=1, rounds=1)
    shared_options.check_json_path(options.json)
    for path in options.input or ():
        if not path.is_dir():
            raise UserError(f"--input: {path} is not a folder; name a folder of text files")


def _compare(options: argparse.Namespace, work: Path) -> int:
    text = gather_text(work / "text", options.input or machine_sources(), options.mb)
    rival_text = text.subset(options.rival_mb, work / "share")
    tokenizer = work / build.TOKENIZER_FILE
    tokenizer.write_text(_tokenizer_json(options.tokenizer, text))
    print(f"{sum(text.bytes) / 1e6:.0f} MB of text, {sum(text.documents):,} documents, {options.workers} workers")
    print(_format_line("pipeline", "", TABLE_HEADER, ""))
    num_differing = 0
    names = options.pipeline or list(PIPELINES)
    for row in measure_pipelines(names, text, rival_text, tokenizer, work, options.workers, options.rounds):
        print(_table_line(row), flush=True)
        shared_options.append_json_row(options.json, row)
        num_differing += 0 if PIPELINES[row.pipeline].is_rival else row.differing_documents or 0
    if num_differing:
        raise PipelineFailed(f"the ids of {num_differing:,} documents differ from the reference's")
    return 0


def _tokenizer_json(tokenizer_path: str | None, text: TextFiles) -> str:
    if tokenizer_path is not None:
        return build.read_tokenizer(tokenizer_path)
    return build.train_bpe(islice(read_documents(text.paths), SAMPLE_DOCUMENTS), VOCAB_SIZE, EOS)


def _table_line(row: PipelineResult) -> str:
    numbers = [
        format_number(row.text_bytes or None, 0, 1e6),
        format_number(row.seconds, 1),
        format_number(row.bytes_per_second, 1, 1e6),
        format_number(row.cpu_seconds, 1),
        format_number(row.bytes_per_cpu_second, 1, 1e6),
        format_number(row.peak_bytes, 0, 2**20),
        format_number(row.differing_documents, 0),
        format_number(row.compared_documents, 0),
    ]
    return _format_line(row.pipeline, row.part, numbers, row.note)


def _format_line(name: str, part: str, numbers: list[str], note: str) -> str:
    return " ".join([name.ljust(22), part.ljust(10), *(number.rjust(8) for number in numbers), " ", note]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
