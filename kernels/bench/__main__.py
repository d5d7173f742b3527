"""The command line: `python -m tandem.kernels.bench [op ...]`."""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from tandem.kernels.bench import single_rank
from tandem.kernels.bench.activation_memory import table
from tandem.kernels.bench.compare import Row, card, rows, said, surroundings
from tandem.kernels.bench.errors import MARK, errors
from tandem.kernels.bench.measure import ceilings
from tandem.kernels.bench.operation import Operation, Refused
from tandem.kernels.bench.ops import OPERATIONS
from tandem.kernels.bench.resources import COMPILED, resources, spills
from tandem.kernels.bench.shapes import MODELS, PRODUCTION

NO_GPU = (
    "tandem.kernels.bench measures a GPU and there is none; without one --resources compiles every kernel for sm_90, "
    "--kept counts the bytes kept for backward, and --device cpu --tokens N runs the harness itself"
)
NUMBERS = ["20% us", "50% us", "80% us", "GB/s", "TFLOP/s", "of peak", "peak MiB"]
WIDTHS = {"op": 20, "shape": 26, "rival": 28, "direction": 16}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a kernel spills more than is known, or an error is above its mark or unknown; 2 if what is asked for cannot
    be, with one line that says why.
    """
    begun = time.monotonic()
    options = _options(arguments)
    if refusal := _refusal(options):
        print(f"tandem.kernels.bench: {refusal}", file=sys.stderr)
        return 2
    operations = [OPERATIONS[name] for name in options.op or OPERATIONS]
    if options.resources:
        return _print_resources(operations, options)
    if options.kept:
        return _print_kept(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    deadline = begun + (math.inf if options.seconds is None else options.seconds)
    if options.errors:
        return _print_errors(operations, options, deadline)
    try:
        _compare(operations, options, deadline)
    finally:
        single_rank.end()
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tandem.kernels.bench", description="Our operations beside their rivals.")
    parser.add_argument("op", nargs="*", metavar="op", help=f"all if none is named: {', '.join(OPERATIONS)}")
    parser.add_argument(
        "--shape",
        default="",
        help="shapes whose name contains this, also those of tp2, tp4 and the small configs, which no one else measures",
    )
    parser.add_argument(
        "--production",
        action="store_true",
        help=f"only shapes of {' and '.join(m.name for m in PRODUCTION)} over one rank",
    )
    parser.add_argument(
        "--seconds", type=float, help="after which nothing new is begun, and rows say what was left out"
    )
    parser.add_argument("--rival", default="", help="only rivals whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that every row is added to, a line each")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, help="instead of the shapes' own number")
    parser.add_argument("--resources", action="store_true", help="compile ours for sm_90 and print what kernels use")
    parser.add_argument(
        "--errors",
        action="store_true",
        help="how far ours and plain torch are from fp64, at the shapes of --production",
    )
    parser.add_argument("--kept", action="store_true", help="count the bytes that a layer keeps for backward, by token")
    return parser.parse_args(arguments)


def _refusal(options: argparse.Namespace) -> str:
    """Why nothing can be done; empty if it can."""
    unknown = [name for name in options.op if name not in OPERATIONS]
    if unknown:
        return f"op {unknown[0]!r} is unknown; known: {', '.join(OPERATIONS)}"
    if options.tokens is not None and options.tokens < 1:
        return f"--tokens {options.tokens}: at least 1"
    if options.seconds is not None and not options.seconds > 0:
        return f"--seconds {options.seconds:g}: more than 0"
    if options.production and options.shape:
        return f"--shape {options.shape} with --production: both choose shapes; ask for one"
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        return f"--json {options.json}: a file in a folder that exists"
    modes = [mode for mode in ("--errors", "--resources", "--kept") if getattr(options, mode[2:])]
    if len(modes) > 1:
        return f"{' and '.join(modes)} are {len(modes)} tables; ask for one"
    refusal = _refusal_of_mode(modes[0], options) if modes else ""
    return refusal if refusal or options.kept else _refusal_of_names(options)


def _refusal_of_mode(mode: str, options: argparse.Namespace) -> str:
    """Of what --errors knows no rivals for, and --resources and --kept take the shapes as they are for."""
    given = {"--rival": options.rival}
    taken = "ops, --shape, --production, --device, --tokens, --seconds and "
    if mode != "--errors":
        given |= {"--tokens": options.tokens, "--seconds": options.seconds, "--production": options.production}
        taken = "ops, --shape and "
    if mode == "--kept":
        given |= {"op": " ".join(options.op), "--shape": options.shape}
        taken = ""
    for name, value in given.items():
        if value:
            said = name if value is True else f"{name} {value}"
            return f"{said} with {mode}: {mode} takes {taken}--json alone"
    if mode != "--errors" and triton.knobs.runtime.interpret:
        return f"{mode}: TRITON_INTERPRET is set, so that nothing would be compiled; unset it"
    return ""


def _refusal_of_names(options: argparse.Namespace) -> str:
    """Of names that are in no table."""
    operations = [OPERATIONS[name] for name in options.op or OPERATIONS]
    if options.resources:
        compiled = [name for name, op in OPERATIONS.items() if op.launches is not None]
        for name in options.op:
            if name not in compiled:
                return f"op {name!r} with --resources has no kernel of ours; known: {', '.join(compiled)}"
        operations = [op for op in operations if op.launches is not None]
    if options.errors:
        precise = [name for name, op in OPERATIONS.items() if op.precision is not None]
        for name in options.op:
            if name not in precise:
                return f"op {name!r} with --errors is none of ours; known: {', '.join(precise)}"
        operations = [op for op in operations if op.precision is not None]
    names = dict.fromkeys(shape.name for op in operations for shape in op.shapes + op.more_shapes)
    if not any(options.shape in name for name in names):
        models = dict.fromkeys(name.split()[0] for name in names)
        return f"--shape {options.shape!r} is in no name; names are as {next(iter(names))!r}, of {', '.join(models)}"
    rivals = dict.fromkeys(rival.name for op in operations if _named(op, options) for rival in op.rivals)
    if not any(options.rival in name for name in rivals):
        return f"--rival {options.rival!r} is in no name; known: {', '.join(rivals)}"
    return ""


def _compare(operations: list[Operation], options: argparse.Namespace, deadline: float) -> None:
    device = torch.device(options.device)
    limits = ceilings(device)
    copied, multiplied = limits.copy_bytes_per_second / 1e9, limits.matmul_flops_per_second / 1e12
    print(*(f"{name} {value}" for name, value in surroundings(card(device)).items()), sep="; ")
    print(f"copy {copied:.0f} GB/s, matmul {multiplied:.1f} TFLOP/s", flush=True)
    _keep(options.json, [{"op": "ceilings", **asdict(limits), **surroundings(card(device))}])
    print(_line("op", "shape", "rival", "direction", NUMBERS), flush=True)
    for op in operations:
        for shape in _shapes(op, options):
            names = _rivals(op, shape, options)
            for row in rows(op, shape, device, limits, names.__contains__, deadline=deadline) if names else ():
                print(_table_line(row), flush=True)
                _keep(options.json, [asdict(row)])


def _shapes(op: Operation, options: argparse.Namespace) -> list[Any]:
    chosen = _named(op, options) if options.shape else op.shapes
    if options.production or (options.errors and not options.shape):
        chosen = [shape for shape in chosen if _model(shape) in [model.name for model in PRODUCTION]]
    return [shape.with_tokens(options.tokens) for shape in chosen] if options.tokens else chosen


def _rivals(op: Operation, shape: Any, options: argparse.Namespace) -> list[str]:
    """A rival that takes seconds to compile is left out at the shapes that others publish, unless it is asked for by name."""
    everyone = bool(options.rival or options.shape) or _model(shape) in [model.name for model in MODELS]
    return [rival.name for rival in op.rivals if options.rival in rival.name and (everyone or not rival.compiles)]


def _model(shape: Any) -> str:
    return str(shape.name).split()[0]


def _named(op: Operation, options: argparse.Namespace) -> list[Any]:
    return [shape for shape in op.shapes + op.more_shapes if options.shape in shape.name]


def _keep(file: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def _line(op: str, shape: str, rival: str, direction: str, numbers: Sequence[str], note: str = "") -> str:
    names = [name.ljust(width) for name, width in zip((op, shape, rival, direction), WIDTHS.values(), strict=True)]
    return " ".join([*names, *(number.rjust(9) for number in numbers), note]).rstrip()


def _table_line(row: Row) -> str:
    peak_mib = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 2**20
    times = [_number(time, 1) for time in (row.time_us_20, row.time_us_50, row.time_us_80)]
    rates = [_number(row.gb_per_second, 0), _number(row.tflops_per_second if row.flops else None, 1)]
    numbers = [*times, *rates, _number(row.fraction, 3), _number(peak_mib, 0)]
    return _line(row.op, row.shape, row.rival, row.direction, numbers, row.note)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_resources(operations: list[Operation], options: argparse.Namespace) -> int:
    numbers = ["registers", "spilled", "shared", "warps", "blocks/SM"]
    print(_line("op", "shape", "kernel", "", numbers))
    seen = []
    for found in resources(operations, options.shape):
        seen.append(found)
        values = asdict(found)
        columns = [str(value) for value in list(values.values())[3:]]
        print(_line(found.op, found.shape, found.kernel, "", columns), flush=True)
        _keep(options.json, [values | surroundings(COMPILED)])
    spilled = spills(seen)
    for sentence, _ in spilled:
        print(sentence, file=sys.stderr)
    return int(not all(known for _, known in spilled))


def _print_errors(operations: list[Operation], options: argparse.Namespace, deadline: float) -> int:
    device = torch.device(options.device)
    print(*(f"{name} {value}" for name, value in surroundings(card(device)).items()), sep="; ")
    print("norm of the difference from fp64, relative; plain torch in the same dtype")
    print(_line("op", "shape", "result", "", ["ours", "plain", "ratio"]), flush=True)
    whole = True
    for op in operations:
        for shape in _shapes(op, options) if op.precision is not None else ():
            try:
                if time.monotonic() >= deadline:
                    raise Refused("left out, time was over")
                found = list(errors(op, shape, device))
            # Of any kind, an operation of ours that fails included: the others have their rows.
            except Exception as reason:
                found, whole = [], False
                print(_line(op.name, shape.name, "", "", [], f"not measured: {said(reason)}"), flush=True)
            for row in found:
                numbers = [f"{row.ours:.2e}", f"{row.plain:.2e}", f"{row.ratio:.3f}"]
                note = "" if row.within else f"above {MARK}"
                print(_line(row.op, row.shape, row.result, row.dtype, numbers, note), flush=True)
                whole = whole and row.within
            _keep(options.json, [asdict(row) | {"ratio": row.ratio} for row in found])
    return int(not whole)


def _print_kept(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        # Of triton 3.9 about Liger's kernels, which do not say what ours do.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        found = table()
    print("bytes per token and layer; the liger kit's heads are torch's")
    parts = [name for name in found[0] if name not in ("model", "kit")]
    print(" ".join(["model".ljust(16), "kit".ljust(26), *(name.rjust(12) for name in parts)]))
    for row in found:
        print(" ".join([row["model"].ljust(16), row["kit"].ljust(26), *(f"{row[name]:12.0f}" for name in parts)]))
    _keep(options.json, [row | surroundings(COMPILED) for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
