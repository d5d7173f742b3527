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
from tandem.kernels.bench.activation_memory import activation_memory_table
from tandem.kernels.bench.compare import Measurement, device_name, environment, measure_rivals, one_line_reason
from tandem.kernels.bench.errors import MAX_ERROR_RATIO, measure_errors
from tandem.kernels.bench.measure import measure_ceilings
from tandem.kernels.bench.operation import Operation, SkipRival
from tandem.kernels.bench.ops import OPERATIONS
from tandem.kernels.bench.resources import COMPILED_DEVICE, describe_spills, kernel_resources
from tandem.kernels.bench.shapes import MODELS, PRODUCTION_MODELS

NO_GPU = (
    "tandem.kernels.bench measures a GPU and there is none; without one --resources compiles every kernel for sm_90, "
    "--activations counts the bytes kept for backward, and --device cpu --tokens N runs the harness itself"
)
NUMBER_COLUMNS = ["20% us", "50% us", "80% us", "GB/s", "TFLOP/s", "of peak", "peak MiB"]
COLUMN_WIDTHS = {"op": 20, "shape": 26, "rival": 28, "direction": 16}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a kernel spills more than is known, or an error is above its mark or unknown; 2 if what is asked for cannot
    be, with one line that says why.
    """
    start_time = time.monotonic()
    options = _parse_arguments(arguments)
    if refusal := _usage_error(options):
        print(f"tandem.kernels.bench: {refusal}", file=sys.stderr)
        return 2
    operations = [OPERATIONS[name] for name in options.op or OPERATIONS]
    if options.resources:
        return _print_resources(operations, options)
    if options.activations:
        return _print_activation_memory(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    deadline = start_time + (math.inf if options.seconds is None else options.seconds)
    if options.errors:
        return _print_errors(operations, options, deadline)
    try:
        _print_comparison(operations, options, deadline)
    finally:
        single_rank.destroy_group()
    return 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
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
        help=f"only shapes of {' and '.join(m.name for m in PRODUCTION_MODELS)} over one rank",
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
    parser.add_argument(
        "--activations", action="store_true", help="count the bytes that a layer keeps for backward, by token"
    )
    return parser.parse_args(arguments)


def _usage_error(options: argparse.Namespace) -> str:
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
    modes = [mode for mode in ("--errors", "--resources", "--activations") if getattr(options, mode[2:])]
    if len(modes) > 1:
        return f"{' and '.join(modes)} are {len(modes)} tables; ask for one"
    refusal = _mode_usage_error(modes[0], options) if modes else ""
    return refusal if refusal or options.activations else _name_usage_error(options)


def _mode_usage_error(mode: str, options: argparse.Namespace) -> str:
    """Of what --errors knows no rivals for, and --resources and --activations take the shapes as they are for."""
    given = {"--rival": options.rival}
    taken = "ops, --shape, --production, --device, --tokens, --seconds and "
    if mode != "--errors":
        given |= {"--tokens": options.tokens, "--seconds": options.seconds, "--production": options.production}
        taken = "ops, --shape and "
    if mode == "--activations":
        given |= {"op": " ".join(options.op), "--shape": options.shape}
        taken = ""
    for name, value in given.items():
        if value:
            given_option = name if value is True else f"{name} {value}"
            return f"{given_option} with {mode}: {mode} takes {taken}--json alone"
    if mode != "--errors" and triton.knobs.runtime.interpret:
        return f"{mode}: TRITON_INTERPRET is set, so that nothing would be compiled; unset it"
    return ""


def _name_usage_error(options: argparse.Namespace) -> str:
    """Of names that are in no table."""
    operations = [OPERATIONS[name] for name in options.op or OPERATIONS]
    if options.resources:
        compiled = [name for name, op in OPERATIONS.items() if op.launch_kernels is not None]
        for name in options.op:
            if name not in compiled:
                return f"op {name!r} with --resources has no kernel of ours; known: {', '.join(compiled)}"
        operations = [op for op in operations if op.launch_kernels is not None]
    if options.errors:
        precise = [name for name, op in OPERATIONS.items() if op.precision is not None]
        for name in options.op:
            if name not in precise:
                return f"op {name!r} with --errors is none of ours; known: {', '.join(precise)}"
        operations = [op for op in operations if op.precision is not None]
    names = dict.fromkeys(shape.name for op in operations for shape in op.shapes + op.extra_shapes)
    if not any(options.shape in name for name in names):
        models = dict.fromkeys(name.split()[0] for name in names)
        return f"--shape {options.shape!r} is in no name; names are as {next(iter(names))!r}, of {', '.join(models)}"
    rivals = dict.fromkeys(rival.name for op in operations if _shapes_by_name(op, options) for rival in op.rivals)
    if not any(options.rival in name for name in rivals):
        return f"--rival {options.rival!r} is in no name; known: {', '.join(rivals)}"
    return ""


def _print_comparison(operations: list[Operation], options: argparse.Namespace, deadline: float) -> None:
    device = torch.device(options.device)
    limits = measure_ceilings(device)
    copy_gb_per_second, matmul_tflops_per_second = (
        limits.copy_bytes_per_second / 1e9,
        limits.matmul_flops_per_second / 1e12,
    )
    print(*(f"{name} {value}" for name, value in environment(device_name(device)).items()), sep="; ")
    print(f"copy {copy_gb_per_second:.0f} GB/s, matmul {matmul_tflops_per_second:.1f} TFLOP/s", flush=True)
    _append_json(options.json, [{"op": "ceilings", **asdict(limits), **environment(device_name(device))}])
    print(_format_line("op", "shape", "rival", "direction", NUMBER_COLUMNS), flush=True)
    for op in operations:
        for shape in _select_shapes(op, options):
            names = _select_rivals(op, shape, options)
            for row in (
                measure_rivals(op, shape, device, limits, names.__contains__, deadline=deadline) if names else ()
            ):
                print(_format_measurement(row), flush=True)
                _append_json(options.json, [asdict(row)])


def _select_shapes(op: Operation, options: argparse.Namespace) -> list[Any]:
    chosen = _shapes_by_name(op, options) if options.shape else op.shapes
    if options.production or (options.errors and not options.shape):
        chosen = [shape for shape in chosen if _model_name(shape) in [model.name for model in PRODUCTION_MODELS]]
    return [shape.with_tokens(options.tokens) for shape in chosen] if options.tokens else chosen


def _select_rivals(op: Operation, shape: Any, options: argparse.Namespace) -> list[str]:
    """A rival that takes seconds to compile is left out at the shapes that others publish, unless it is asked for by name."""
    includes_slow = bool(options.rival or options.shape) or _model_name(shape) in [model.name for model in MODELS]
    return [
        rival.name
        for rival in op.rivals
        if options.rival in rival.name and (includes_slow or not rival.is_slow_to_compile)
    ]


def _model_name(shape: Any) -> str:
    return str(shape.name).split()[0]


def _shapes_by_name(op: Operation, options: argparse.Namespace) -> list[Any]:
    return [shape for shape in op.shapes + op.extra_shapes if options.shape in shape.name]


def _append_json(file: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


def _format_line(op: str, shape: str, rival: str, direction: str, numbers: Sequence[str], note: str = "") -> str:
    names = [
        name.ljust(width) for name, width in zip((op, shape, rival, direction), COLUMN_WIDTHS.values(), strict=True)
    ]
    return " ".join([*names, *(number.rjust(9) for number in numbers), note]).rstrip()


def _format_measurement(row: Measurement) -> str:
    peak_mib = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 2**20
    times = [_format_number(time, 1) for time in (row.time_p20_us, row.time_p50_us, row.time_p80_us)]
    rates = [_format_number(row.gb_per_second, 0), _format_number(row.tflops_per_second if row.flops else None, 1)]
    numbers = [*times, *rates, _format_number(row.fraction, 3), _format_number(peak_mib, 0)]
    return _format_line(row.op, row.shape, row.rival, row.direction, numbers, row.note)


def _format_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_resources(operations: list[Operation], options: argparse.Namespace) -> int:
    numbers = ["registers", "spilled", "shared", "warps", "blocks/SM"]
    print(_format_line("op", "shape", "kernel", "", numbers))
    seen = []
    for found in kernel_resources(operations, options.shape):
        seen.append(found)
        values = asdict(found)
        columns = [str(value) for value in list(values.values())[3:]]
        print(_format_line(found.op, found.shape, found.kernel, "", columns), flush=True)
        _append_json(options.json, [values | environment(COMPILED_DEVICE)])
    spilled = describe_spills(seen)
    for sentence, _ in spilled:
        print(sentence, file=sys.stderr)
    return int(not all(known for _, known in spilled))


def _print_errors(operations: list[Operation], options: argparse.Namespace, deadline: float) -> int:
    device = torch.device(options.device)
    print(*(f"{name} {value}" for name, value in environment(device_name(device)).items()), sep="; ")
    print("norm of the difference from fp64, relative; plain torch in the same dtype")
    print(_format_line("op", "shape", "result", "", ["ours", "plain", "ratio"]), flush=True)
    all_within = True
    for op in operations:
        for shape in _select_shapes(op, options) if op.precision is not None else ():
            try:
                if time.monotonic() >= deadline:
                    raise SkipRival("left out, time was over")
                found = list(measure_errors(op, shape, device))
            # Of any kind, an operation of ours that fails included: the others have their rows.
            except Exception as reason:
                found, all_within = [], False
                print(
                    _format_line(op.name, shape.name, "", "", [], f"not measured: {one_line_reason(reason)}"),
                    flush=True,
                )
            for row in found:
                numbers = [f"{row.ours:.2e}", f"{row.plain:.2e}", f"{row.ratio:.3f}"]
                note = "" if row.is_within_limit else f"above {MAX_ERROR_RATIO}"
                print(_format_line(row.op, row.shape, row.result, row.dtype, numbers, note), flush=True)
                all_within = all_within and row.is_within_limit
            _append_json(options.json, [asdict(row) | {"ratio": row.ratio} for row in found])
    return int(not all_within)


def _print_activation_memory(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        # Of triton 3.9 about Liger's kernels, which do not say what ours do.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        found = activation_memory_table()
    print("bytes per token and layer; the liger kit's heads are torch's")
    parts = [name for name in found[0] if name not in ("model", "implementation")]
    print(" ".join(["model".ljust(16), "implementation".ljust(26), *(name.rjust(12) for name in parts)]))
    for row in found:
        print(
            " ".join(
                [row["model"].ljust(16), row["implementation"].ljust(26), *(f"{row[name]:12.0f}" for name in parts)]
            )
        )
    _append_json(options.json, [row | environment(COMPILED_DEVICE) for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
