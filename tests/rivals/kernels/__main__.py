"""The command `python -m tests.rivals.kernels [op ...]`, from the root of the checkout."""

import argparse
import math
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
import triton

from tandem.kernels.bench import command
from tandem.kernels.bench.compare import NotMeasured, device_name, environment, one_line_reason
from tandem.kernels.bench.shapes import MODELS, Shape
from tests.rivals.kernels import single_rank
from tests.rivals.kernels.activation_memory import activation_memory_table
from tests.rivals.kernels.compare import measure_rivals
from tests.rivals.kernels.errors import MAX_ERROR_RATIO, PRECISIONS, measure_errors
from tests.rivals.kernels.launches import LAUNCHES
from tests.rivals.kernels.operation import ContestedOperation, Rival
from tests.rivals.kernels.ops import OPERATIONS
from tests.rivals.kernels.resources import COMPILED_DEVICE, describe_spills, kernel_resources

PROGRAM = "tests.rivals.kernels"
NO_GPU = (
    "there is no GPU to measure; without one, --resources compiles every kernel for sm_90, --activations counts the bytes kept "
    "for backward, and --device cpu --tokens N runs the harness itself"
)
MODES = ("--errors", "--resources", "--activations")


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 if a spill is not known, or an error is unknown or above its limit; 2, with one line, for bad usage."""
    start_time = time.monotonic()
    options = _make_parser().parse_args(arguments)
    error = command.usage_error(options, OPERATIONS) or _mode_error(options)
    if not error and options.device == "cuda" and not (options.resources or options.activations):
        error = "" if torch.cuda.is_available() else NO_GPU
    if error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    operations = command.named_operations(options, OPERATIONS)
    if options.resources:
        return _print_resources(operations, options)
    if options.activations:
        return _print_activation_memory(options)
    if options.errors:
        return _print_errors(operations, options, start_time + options.seconds)
    try:
        _print_comparison(operations, options, start_time + options.seconds)
    finally:
        single_rank.destroy_group()
    return 0


def _print_comparison(operations: list[ContestedOperation], options: argparse.Namespace, deadline: float) -> None:
    device = torch.device(options.device)
    ceilings = command.print_ceilings(device, options.json)
    for op in operations:
        for shape in command.select_shapes(op, options):
            names = [
                rival.name for rival in op.rivals if options.rival in rival.name and _is_included(shape, rival, options)
            ]
            if names:
                rows = measure_rivals(op, shape, device, ceilings, names.__contains__, deadline=deadline)
                command.print_rows(rows, options.json)


def _is_included(shape: Shape, rival: Rival, options: argparse.Namespace) -> bool:
    """Leave out what compiles for seconds at the shapes that others publish, unless it is asked for by name."""
    is_ours = shape.model_name in [model.name for model in MODELS]
    return is_ours or not rival.is_slow_to_compile or bool(options.rival or options.shape)


def _make_parser() -> argparse.ArgumentParser:
    parser = command.make_parser(PROGRAM, "Our operations next to their rivals.", OPERATIONS)
    for mode, help_text in zip(
        MODES,
        (
            "compare ours and plain torch with fp64, by default at the shapes of --production",
            "compile our kernels for sm_90 and print the registers and memory they use",
            "count the bytes per token that a layer keeps for backward",
        ),
        strict=True,
    ):
        parser.add_argument(mode, action="store_true", help=help_text)
    return parser


def _mode_error(options: argparse.Namespace) -> str:
    modes = [mode for mode in MODES if getattr(options, mode[2:])]
    if len(modes) > 1:
        return f"{' and '.join(modes)} are {len(modes)} tables; ask for one"
    if not modes:
        return command.selection_error(options, OPERATIONS)
    [mode] = modes
    refused: dict[str, Any] = {"--rival": options.rival}
    taken = "ops, --shape, --production, --device, --tokens, --seconds and "
    if mode != "--errors":
        refused |= {
            "--tokens": options.tokens,
            "--seconds": options.seconds if math.isfinite(options.seconds) else None,
            "--production": options.production,
        }
        taken = "ops, --shape and "
    if mode == "--activations":
        refused |= {"op": " ".join(options.op), "--shape": options.shape}
        taken = ""
    for name, value in refused.items():
        if value:
            option = name if value is True else f"{name} {value}"
            return f"{option} with {mode}: {mode} takes only {taken}--json"
    if mode != "--errors" and triton.knobs.runtime.interpret:
        return f"{mode}: TRITON_INTERPRET is set, so nothing would be compiled; unset it"
    if mode == "--activations":
        return ""
    known = {name: op for name, op in OPERATIONS.items() if name in (LAUNCHES if mode == "--resources" else PRECISIONS)}
    for name in options.op:
        if name not in known:
            return f"op {name!r} with {mode}: we have no kernel for it; choose from {', '.join(known)}"
    return command.selection_error(options, known)


def _print_resources(operations: list[ContestedOperation], options: argparse.Namespace) -> int:
    print(command.format_line(("op", "shape", "kernel", ""), ["registers", "spilled", "shared", "warps", "blocks/SM"]))
    seen = []
    for found in kernel_resources(operations, options.shape):
        seen.append(found)
        values = asdict(found)
        columns = [str(value) for value in list(values.values())[3:]]
        print(command.format_line((found.op, found.shape, found.kernel, ""), columns), flush=True)
        command.append_json(options.json, [values | environment(COMPILED_DEVICE)])
    spilled = describe_spills(seen)
    for sentence, _ in spilled:
        print(sentence, file=sys.stderr)
    return int(not all(known for _, known in spilled))


def _print_errors(operations: list[ContestedOperation], options: argparse.Namespace, deadline: float) -> int:
    device = torch.device(options.device)
    options.production = options.production or not options.shape
    command.print_environment(environment(device_name(device)))
    print("norm of the difference from fp64, relative; plain is torch in the same dtype")
    print(command.format_line(("op", "shape", "result", ""), ["ours", "plain", "ratio"]), flush=True)
    all_within = True
    for op in operations:
        for shape in command.select_shapes(op, options) if op.name in PRECISIONS else ():
            try:
                if time.monotonic() >= deadline:
                    raise NotMeasured("out of time")
                found = list(measure_errors(op, shape, device))
            # An operation may raise anything, and its failure must not lose the rows of the others.
            except Exception as reason:
                found, all_within = [], False
                note = f"not measured: {one_line_reason(reason)}"
                print(command.format_line((op.name, shape.name, "", ""), [], note), flush=True)
            for row in found:
                numbers = [f"{row.ours:.2e}", f"{row.plain:.2e}", f"{row.ratio:.3f}"]
                note = "" if row.is_within_limit else f"above {MAX_ERROR_RATIO}"
                print(command.format_line((row.op, row.shape, row.result, row.dtype), numbers, note), flush=True)
                all_within = all_within and row.is_within_limit
            command.append_json(options.json, [asdict(row) | {"ratio": row.ratio} for row in found])
    return int(not all_within)


def _print_activation_memory(options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        # triton 3.9 warns about Liger's kernels, which lack a setting that ours have.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        found = activation_memory_table()
    print("bytes per token and layer; the heads of the Liger layer are torch's")
    parts = [name for name in found[0] if name not in ("model", "implementation")]
    print(" ".join(["model".ljust(16), "implementation".ljust(26), *(name.rjust(12) for name in parts)]))
    for row in found:
        numbers = (f"{row[name]:12.0f}" for name in parts)
        print(" ".join([row["model"].ljust(16), row["implementation"].ljust(26), *numbers]))
    command.append_json(options.json, [row | environment(COMPILED_DEVICE) for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
