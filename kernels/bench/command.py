"""The command `python -m tandem.kernels.bench [op ...]`: options, their checks, the choice of shapes, and the output."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tandem.kernels.bench.compare import Row, device_name, environment, measure_shape
from tandem.kernels.bench.measure import Ceilings, measure_ceilings
from tandem.kernels.bench.ops import OPERATIONS, Operation
from tandem.kernels.bench.shapes import PRODUCTION_MODELS, Shape

PROGRAM = "tandem.kernels.bench"
NUMBER_COLUMNS = {"20% us": 1, "50% us": 1, "80% us": 1, "GB/s": 0, "TFLOP/s": 1, "of peak": 3, "peak MiB": 0}
"""With their decimals."""
COLUMN_WIDTHS = (20, 26, 28, 16)
"""Of operation, shape, rival and direction."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line on standard error if the request cannot be met."""
    start_time = time.monotonic()
    options = make_parser(PROGRAM, "Our operations next to plain torch.", OPERATIONS).parse_args(arguments)
    error = usage_error(options, OPERATIONS) or selection_error(options, OPERATIONS)
    if not error and options.device == "cuda" and not torch.cuda.is_available():
        error = "there is no GPU to measure; to run the harness itself on a CPU, use --device cpu --tokens N"
    if error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    device, deadline = torch.device(options.device), start_time + options.seconds
    ceilings = print_ceilings(device, options.json)
    for op in named_operations(options, OPERATIONS):
        for shape in select_shapes(op, options):
            print_rows(measure_shape(op, shape, device, ceilings, options.rival, deadline=deadline), options.json)
    return 0


def make_parser(program: str, description: str, operations: dict[str, Operation]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("op", nargs="*", metavar="op", help=f"default: all of {', '.join(operations)}")
    add("--shape", default="", help="every shape whose name contains this, including tp2, tp4 and the small configs")
    add("--production", action="store_true", help=f"only the shapes of {' and '.join(PRODUCTION_MODELS)} on one rank")
    add("--seconds", type=float, default=math.inf, help="start nothing after this time; rows report what was left out")
    add("--rival", default="", help="only the implementations whose name contains this: ours, torch, ...")
    add("--json", type=Path, metavar="FILE", help="append one JSON line per row to this file")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tokens", type=int, help="replaces the number of tokens of each shape")
    return parser


def usage_error(options: argparse.Namespace, operations: dict[str, Operation]) -> str:
    """Why the options cannot be honoured; empty if they can. For names of shapes and rivals: `selection_error`."""
    for name in options.op:
        if name not in operations:
            return f"op {name!r} is unknown; choose from {', '.join(operations)}"
    if options.tokens is not None and options.tokens < 1:
        return f"--tokens {options.tokens}: must be at least 1"
    if not options.seconds > 0:
        return f"--seconds {options.seconds:g}: must be more than 0"
    if options.production and options.shape:
        return f"--shape {options.shape} with --production: both choose shapes; use one of them"
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        return f"--json {options.json}: must be a file in a folder that exists"
    return ""


def selection_error(options: argparse.Namespace, operations: dict[str, Operation]) -> str:
    """Why `--shape` or `--rival` selects nothing; empty if both select something."""
    chosen = named_operations(options, operations)
    names = dict.fromkeys(shape.name for op in chosen for shape in op.shapes + op.extra_shapes)
    if not any(options.shape in name for name in names):
        models = dict.fromkeys(name.split()[0] for name in names)
        return f"--shape {options.shape!r} matches no shape; names look like {next(iter(names))!r}, for {', '.join(models)}"
    rivals = dict.fromkeys(name for op in chosen if _named_shapes(op, options) for name in op.implementations)
    if not any(options.rival in name for name in rivals):
        return f"--rival {options.rival!r} matches no implementation; choose from {', '.join(rivals)}"
    return ""


def named_operations(options: argparse.Namespace, operations: dict[str, Operation]) -> list[Operation]:
    return [operations[name] for name in options.op or operations]


def _named_shapes(op: Operation, options: argparse.Namespace) -> list[Shape]:
    return [shape for shape in op.shapes + op.extra_shapes if options.shape in shape.name]


def select_shapes(op: Operation, options: argparse.Namespace) -> list[Shape]:
    chosen = _named_shapes(op, options) if options.shape else op.shapes
    if options.production:
        chosen = [shape for shape in chosen if shape.model_name in PRODUCTION_MODELS]
    return [shape.with_tokens(options.tokens) for shape in chosen] if options.tokens else chosen


def print_ceilings(device: torch.device, file: Path | None) -> Ceilings:
    """Measure and print the ceilings, then the head of the rows' table."""
    ceilings, facts = measure_ceilings(device), environment(device_name(device))
    print_environment(facts)
    copy, matmul = ceilings.copy_bytes_per_second / 1e9, ceilings.matmul_flops_per_second / 1e12
    print(f"copy {copy:.0f} GB/s, matmul {matmul:.1f} TFLOP/s", flush=True)
    append_json(file, [{"op": "ceilings", **ceilings._asdict(), **facts}])
    print(format_line(("op", "shape", "rival", "direction"), [*NUMBER_COLUMNS]), flush=True)
    return ceilings


def print_rows(rows: Iterable[Row], file: Path | None) -> None:
    for row in rows:
        peak_mib = None if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / 2**20
        tflops = row["tflops_per_second"] if row["flops"] else None
        times = row["time_p20_us"], row["time_p50_us"], row["time_p80_us"]
        values = zip(
            (*times, row["gb_per_second"], tflops, row["fraction"], peak_mib), NUMBER_COLUMNS.values(), strict=True
        )
        numbers = ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
        names = row["op"], row["shape"], row["rival"], row["direction"]
        print(format_line(names, numbers, row["note"]), flush=True)
        append_json(file, [row])


def print_environment(facts: dict[str, str]) -> None:
    print(*(f"{name} {value}" for name, value in facts.items()), sep="; ", flush=True)


def append_json(file: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def format_line(names: Sequence[str], numbers: Sequence[str], note: str = "") -> str:
    padded = [name.ljust(width) for name, width in zip(names, COLUMN_WIDTHS, strict=True)]
    return " ".join([*padded, *(number.rjust(9) for number in numbers), note]).rstrip()
