"""`python -m tests.rivals.tables FOLDER`: print the JSON lines that launch/bench.sh wrote as Markdown tables.

The first line names card, versions and commit, so that the tables can be pasted into a README. Figures are shown with their
targets and with predictions made before any GPU run. Needs no torch.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandem.trainer import journal
from tandem.trainer.config import UserError

Line = dict[str, Any]

STEP_TARGETS: dict[tuple[str, str], tuple[str, float, float]] = {
    ("btlm-3b-8k", "2k"): ("tokens_per_second", 24_500.0, 33_200.0),
    ("btlm-3b-8k", "8k"): ("tokens_per_second", 17_500.0, 26_000.0),
    ("stablelm-2-12b", "4k"): ("mfu_at_full_batch", 0.50, 0.62),
}
"""Config and phase -> field of a step's line, target of a first visit, and goal, on one H100 or H200.

On 15 nodes a replica of the BTLM recipe has four micro-batches, so its step is judged as measured. In the slice of the 12B, a
sixth of the layers with a whole embedding, the update weighs more than in the recipe, so it is judged at the recipe's batch."""
MAX_SHOWN_VARIANTS = 2
STEP_PREDICTIONS: dict[tuple[str, str], str] = {
    ("btlm-3b-8k", "2k"): "27,900 tokens/s, MFU 50 / 47 %",
    ("btlm-3b-8k", "8k"): "21,800 tokens/s, MFU 53 / 44 %",
    ("stablelm-2-12b", "4k"): "MFU 52 / 49 %",
}
"""Predictions from the bytes and operations of each part, at the recipe's batch."""
KERNEL_TARGETS: dict[tuple[str, str, str], tuple[str, float]] = {
    ("swiglu", "", ""): ("fraction", 0.93),
    ("qkv", "", ""): ("fraction", 0.93),
    ("residual_norm", "", ""): ("fraction", 0.93),
    ("linear_cross_entropy", "", ""): ("executed_tflops_per_second", 720.0),
    ("attention", "stablelm-2-12b 4096 tp1", "forward"): ("tflops_per_second", 600.0),
    ("attention", "stablelm-2-12b 4096 tp1", "backward"): ("tflops_per_second", 450.0),
    ("attention", "btlm-3b-8k 8192 tp1", "forward"): ("tflops_per_second", 450.0),
    ("attention", "btlm-3b-8k 8192 tp1", "backward"): ("tflops_per_second", 350.0),
}
"""Operation, shape and direction, empty for any -> field of our row, and its target."""


def main(argv: list[str] | None = None) -> int:
    """Print the tables of a folder. Returns 2, with one line on standard error, if there is nothing to print."""
    parser = argparse.ArgumentParser(
        "tests.rivals.tables", description="Print the tables of a folder that launch/bench.sh filled."
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    try:
        tables = [*format_tables(folder)]
    except UserError as error:
        print(f"tests.rivals.tables: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(tables))
    return 0


def format_tables(folder: Path) -> Iterator[str]:
    """Yield one table per kind of line in the folder. Raises: UserError if it has none, or if a line is not JSON."""
    lines = {name: read_lines(folder / f"{name}.jsonl") for name in ("steps", "kernels", "errors", "sweep")}
    if not any(lines.values()):
        raise UserError(f"{folder}: has no line of a measurement; name a folder that launch/bench.sh filled")
    yield from format_environment([line for found in lines.values() for line in found])
    for name, make in (
        ("kernels", kernel_table),
        ("errors", error_table),
        ("sweep", sweep_table),
        ("steps", step_table),
    ):
        if lines[name]:
            yield make(lines[name])


def read_lines(file: Path) -> list[Line]:
    """Return the file's JSON lines, without a last line that was cut by a kill. A missing file has none."""
    try:
        return list(journal.read_records(file, strict=True))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: {error.msg}, so it is not from launch/bench.sh; remove the file") from error


def format_environment(lines: list[Line]) -> Iterator[str]:
    """Yield card, versions and commits of the lines, and the ceilings of each process."""
    facts = {
        name: dict.fromkeys(str(line[name]) for line in lines if line.get(name))
        for name in ("torch", "triton", "commit")
    }
    cards = dict.fromkeys(str(line["device"]) for line in lines)
    yield "; ".join([", ".join(cards), *(f"{name} {', '.join(found)}" for name, found in facts.items())])
    ceilings = [line for line in lines if line.get("op") == "ceilings"]
    if ceilings:
        yield "\n".join(
            f"copy {line['copy_bytes_per_second'] / 1e9:,.0f} GB/s, matmul {line['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s"
            for line in ceilings
        )


def step_table(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        key = line["config"], line["phase"]
        layers = (
            f"{line['num_layers']} of {line['recipe_num_layers']}"
            if line["num_layers"] < line["recipe_num_layers"]
            else line["num_layers"]
        )
        rows.append([
            *key, layers, f"{line['num_micro_batches']} x {line['micro_batch_size']}", format_overrides(line),
            f"{1e3 * line['step_seconds']:,.1f}", f"{line['tokens_per_second']:,.0f}",
            f"{100 * line['mfu']:.1f} / {100 * line['mfu_causal']:.1f}",
            f"{100 * line['derived']['mfu_at_full_batch']:.1f}", format_gib(line["peak_allocated_gib"]),
            *(f"{1e3 * line['part_seconds'][part]:,.1f}" for part in ("forward", "backward", "update")),
            *((format_target(line | line["derived"], *STEP_TARGETS[key][:2]), STEP_PREDICTIONS[key])
              if key in STEP_TARGETS and not format_overrides(line) else ("", "")),
        ])  # fmt: skip
    head = [
        "config", "phase", "layers", "micro-batches", "overrides", "step ms", "tokens/s", "MFU full / causal %",
        "MFU at full batch %", "peak GiB", "forward ms", "backward ms", "update ms", "target", "predicted",
    ]  # fmt: skip
    return "\n\n".join([markdown_table(head, rows), *(kind_table(line) for line in lines if line.get("kind_seconds"))])


def format_overrides(line: Line) -> str:
    """The config's overrides, without the one that every single-GPU line has."""
    return " ".join(word for word in line["overrides"] if word != "parallel.tp_size=1")


def kind_table(line: Line) -> str:
    """The profiled step's time by kind of operation."""
    step_seconds = line["kind_seconds"]["step"]
    kinds = sorted(((name, s) for name, s in line["kind_seconds"].items() if name != "step"), key=lambda kind: -kind[1])
    rows = [[name, f"{1e3 * seconds:,.1f}", f"{100 * seconds / step_seconds:.1f}"] for name, seconds in kinds]
    rows.append(["the step", f"{1e3 * step_seconds:,.1f}", ""])
    return markdown_table([f"{line['config']} {line['phase']}", "ms", "% of the step"], rows)


def kernel_table(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        if line["op"] == "ceilings" or line["direction"] == "forward+backward":  # a sum of other rows
            continue
        key = line["op"], line["shape"], line["rival"], line["direction"]
        if line["time_p50_us"] is None:
            rows.append([*key, "", "", "", "", "", line["note"][:60]])
            continue
        rate = (
            f"{line['tflops_per_second']:,.0f} TF"
            if line["ceiling"] == "matmul"
            else f"{line['gb_per_second']:,.0f} GB"
        )
        spread = (line["time_p80_us"] - line["time_p20_us"]) / line["time_p50_us"]
        target = next((mark for pattern, mark in KERNEL_TARGETS.items() if matches_pattern(pattern, line)), None)
        rows.append([
            *key, f"{line['time_p50_us']:,.1f}", f"{100 * spread:.1f}", rate, f"{100 * line['fraction']:.1f}",
            format_target(line, *target) if target and line["rival"] == "ours" else "", line["note"],
        ])  # fmt: skip
    head = [
        "op",
        "shape",
        "rival",
        "direction",
        "median us",
        "spread %",
        "per second",
        "% of ceiling",
        "target",
        "note",
    ]
    return markdown_table(head, rows)


def matches_pattern(pattern: tuple[str, str, str], line: Line) -> bool:
    """Whether operation, shape and direction match; empty fields match anything."""
    return all(given in ("", line[name]) for given, name in zip(pattern, ("op", "shape", "direction"), strict=True))


def error_table(lines: list[Line]) -> str:
    rows = [
        [
            line["op"],
            line["shape"],
            line["result"],
            f"{line['ours']:.2e}",
            f"{line['plain']:.2e}",
            f"{line['ratio']:.3f}",
        ]
        for line in lines
    ]
    return markdown_table(["op", "shape", "result", "our error", "plain torch's", "ratio (target: 1.1)"], rows)


def sweep_table(lines: list[Line]) -> str:
    """The fastest variants of each kernel at each shape, and the variant with the shipped sizes."""
    rows = []
    for kernel, shape in dict.fromkeys((line["kernel"], line["shape"]) for line in lines):
        kernel_lines = [line for line in lines if (line["kernel"], line["shape"]) == (kernel, shape)]
        timed = sorted((line for line in kernel_lines if line["time_p50_us"]), key=lambda line: line["time_p50_us"])
        for place, line in enumerate(timed):
            if place < MAX_SHOWN_VARIANTS or line["own"]:
                spread = (line["time_p80_us"] - line["time_p20_us"]) / line["time_p50_us"]
                rows.append([
                    kernel, shape, line["candidate"], f"{line['time_p50_us']:,.1f}", f"{100 * spread:.1f}",
                    f"{line['executed_tflops_per_second']:,.0f}", "shipped sizes" if line["own"] else "",
                ])  # fmt: skip
    return markdown_table(["kernel", "shape", "variant", "median us", "spread %", "executed TFLOP/s", "note"], rows)


def format_target(line: Line, field: str, target: float) -> str:
    """Format the target and whether the line reaches it."""
    is_fraction = field in ("mfu_at_full_batch", "fraction")
    target_text = f"{100 * target:g} %" if is_fraction else f"{target:,g}"
    return f"{target_text}: {'reached' if line[field] >= target else 'missed'}"


def format_gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def markdown_table(head: list[str], rows: Iterable[list[Any]]) -> str:
    """Format an aligned table without the columns that are empty in every row."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    used = [index for index in range(len(head)) if any(row[index] for row in cells[1:])] or list(range(len(head)))
    widths = [max(len(row[index]) for row in cells) for index in used]
    padded = [" | ".join(row[index].ljust(width) for index, width in zip(used, widths, strict=True)) for row in cells]
    return "\n".join(f"| {line} |" for line in [padded[0], " | ".join("-" * width for width in widths), *padded[1:]])


if __name__ == "__main__":
    sys.exit(main())
