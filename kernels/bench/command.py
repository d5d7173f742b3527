"""The parts of a command line that measures operations: options, their checks, the choice of shapes, and the output."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tandem.kernels.bench.compare import Measurement, device_name, environment, measure_rivals
from tandem.kernels.bench.measure import measure_ceilings
from tandem.kernels.bench.operation import Operation, Rival
from tandem.kernels.bench.shapes import PRODUCTION_MODELS

NUMBER_COLUMNS = ["20% us", "50% us", "80% us", "GB/s", "TFLOP/s", "of peak", "peak MiB"]
COLUMN_WIDTHS = (20, 26, 28, 16)
"""Of operation, shape, rival and direction."""


def make_parser(program: str, description: str, operations: dict[str, Operation]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("op", nargs="*", metavar="op", help=f"default: all of {', '.join(operations)}")
    add("--shape", default="", help="every shape whose name contains this, including tp2, tp4 and the small configs")
    production = " and ".join(model.name for model in PRODUCTION_MODELS)
    add("--production", action="store_true", help=f"only the shapes of {production} on one rank")
    add("--seconds", type=float, help="start nothing new after this time; rows report what was left out")
    add("--rival", default="", help="only the implementations whose name contains this: ours, torch, ...")
    add("--json", type=Path, metavar="FILE", help="append one JSON line per row to this file")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tokens", type=int, help="replaces the number of tokens of each shape")
    return parser


def usage_error(options: argparse.Namespace, operations: dict[str, Operation]) -> str:
    """Why the options cannot be honoured; empty if they can. For names of shapes and rivals: `selection_error`."""
    unknown = [name for name in options.op if name not in operations]
    if unknown:
        return f"op {unknown[0]!r} is unknown; choose from {', '.join(operations)}"
    if options.tokens is not None and options.tokens < 1:
        return f"--tokens {options.tokens}: must be at least 1"
    if options.seconds is not None and not options.seconds > 0:
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
    rivals = dict.fromkeys(rival.name for op in chosen if shapes_by_name(op, options) for rival in op.rivals)
    if not any(options.rival in name for name in rivals):
        return f"--rival {options.rival!r} matches no implementation; choose from {', '.join(rivals)}"
    return ""


def named_operations(options: argparse.Namespace, operations: dict[str, Operation]) -> list[Operation]:
    return [operations[name] for name in options.op or operations]


def shapes_by_name(op: Operation, options: argparse.Namespace) -> list[Any]:
    return [shape for shape in op.shapes + op.extra_shapes if options.shape in shape.name]


def select_shapes(op: Operation, options: argparse.Namespace) -> list[Any]:
    chosen = shapes_by_name(op, options) if options.shape else op.shapes
    if options.production:
        names = [model.name for model in PRODUCTION_MODELS]
        chosen = [shape for shape in chosen if shape.model_name in names]
    return [shape.with_tokens(options.tokens) for shape in chosen] if options.tokens else chosen


def print_comparison(
    operations: Iterable[Operation],
    options: argparse.Namespace,
    start_time: float,
    is_included: Callable[[Any, Rival], bool] = lambda shape, rival: True,
) -> None:
    """Measure and print one row for each shape, rival and direction; `start_time` is one of time.monotonic()."""
    deadline = start_time + (math.inf if options.seconds is None else options.seconds)
    device = torch.device(options.device)
    limits, facts = measure_ceilings(device), environment(device_name(device))
    print_environment(facts)
    copy, matmul = limits.copy_bytes_per_second / 1e9, limits.matmul_flops_per_second / 1e12
    print(f"copy {copy:.0f} GB/s, matmul {matmul:.1f} TFLOP/s", flush=True)
    append_json(options.json, [{"op": "ceilings", **asdict(limits), **facts}])
    print(format_line(("op", "shape", "rival", "direction"), NUMBER_COLUMNS), flush=True)
    for op in operations:
        for shape in select_shapes(op, options):
            names = [rival.name for rival in op.rivals if options.rival in rival.name and is_included(shape, rival)]
            if not names:
                continue
            for row in measure_rivals(op, shape, device, limits, names.__contains__, deadline=deadline):
                print(format_measurement(row), flush=True)
                append_json(options.json, [asdict(row)])


def print_environment(facts: dict[str, str]) -> None:
    print(*(f"{name} {value}" for name, value in facts.items()), sep="; ", flush=True)


def append_json(file: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def format_line(names: Sequence[str], numbers: Sequence[str], note: str = "") -> str:
    padded = [name.ljust(width) for name, width in zip(names, COLUMN_WIDTHS, strict=True)]
    return " ".join([*padded, *(number.rjust(9) for number in numbers), note]).rstrip()


def format_measurement(row: Measurement) -> str:
    peak_mib = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 2**20
    tflops = row.tflops_per_second if row.flops else None
    columns = [(row.time_p20_us, 1), (row.time_p50_us, 1), (row.time_p80_us, 1), (row.gb_per_second, 0), (tflops, 1)]
    columns += [(row.fraction, 3), (peak_mib, 0)]
    numbers = ["-" if value is None else f"{value:.{digits}f}" for value, digits in columns]
    return format_line((row.op, row.shape, row.rival, row.direction), numbers, row.note)
