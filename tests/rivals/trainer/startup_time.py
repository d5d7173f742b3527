"""`python -m tests.rivals.trainer.startup_time CONFIG`: how long `tandem train` takes to its first step, new and resumed.

Runs real commands; each start is followed by a resume of the same run. The parts are those in the start record of
metrics.jsonl. The first step counts too, because it does one-time work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from tandem.trainer.config import UserError, load_config
from tandem.trainer.metrics.history import read_history

BENCH_OVERRIDES = (
    "run.stop_step={step}",
    "evaluate.every_steps=0",
    "checkpoint.every_steps=0",
    "checkpoint.keep_last=1",
)
STEP_PART, TOTAL_PART = "step", "command to end of step"


def time_command(command: list[str], folder: Path) -> dict[str, float]:
    """Run the command; return the parts of its start in order, its first step, and the total."""
    start_time = time.time()
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(command[3:])}: {process.stderr.strip().splitlines()[-1]}")
    history = read_history(folder)
    step = history.steps[-1]
    return {
        **history.starts[-1]["start_seconds"],
        STEP_PART: step["step_seconds"],
        TOTAL_PART: step["time"] - start_time,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the commands and return the JSON line."""
    load_before = os.getloadavg()[0]
    config = load_config(arguments.config, arguments.overrides)
    folder = arguments.folder / config.run.name
    rows: dict[str, list[dict[str, float]]] = {"fresh": [], "resume": []}
    num_bytes = 0
    for _ in range(arguments.times):
        shutil.rmtree(folder, ignore_errors=True)
        for step, (kind, found) in enumerate(rows.items(), start=1):
            found.append(time_command(train_command(arguments, step), folder))
            print_stderr(f"{kind}: {found[-1][TOTAL_PART]:.1f} s")
        num_bytes = read_history(folder).checkpoints[-1]["bytes"]
    shutil.rmtree(folder)
    medians = {kind: {part: median([row[part] for row in found]) for part in found[0]} for kind, found in rows.items()}
    check_seconds = medians["resume"].get("checkpoint checked", 0.0)
    return {
        "config": config.run.name,
        "world_size": arguments.ranks or config.parallel.tp_size,
        "num_starts": arguments.times,
        "seconds": medians,
        "checkpoint_bytes": num_bytes,
        "check_bytes_per_second": num_bytes / check_seconds if check_seconds else None,
        "load_average": [load_before, os.getloadavg()[0]],
    }


def train_command(arguments: argparse.Namespace, step: int) -> list[str]:
    """The `tandem train` command that ends at this step."""
    ranks = ["--ranks", str(arguments.ranks)] if arguments.ranks else []
    bench_overrides = [field.format(step=step) for field in BENCH_OVERRIDES]
    words = [str(arguments.config), *arguments.overrides, f"run.root={arguments.folder}", *bench_overrides, *ranks]
    return [sys.executable, "-m", "tandem.trainer", "train", *words]


def format_table(result: dict[str, Any]) -> str:
    """Format the medians, one row per part."""
    seconds = result["seconds"]
    parts = list(dict.fromkeys(part for kind in seconds.values() for part in kind))
    rows = [
        f"| {part} | " + " | ".join(f"{kind.get(part, 0):.2f}" for kind in seconds.values()) + " |" for part in parts
    ]
    return "\n".join([f"| seconds | {' | '.join(seconds)} |", "| --- |" + " ---: |" * len(seconds), *rows])


def print_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tests.rivals.trainer.startup_time", description="Measure how long a start and a resume take."
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run; its corpus must exist")
    add("overrides", nargs="*", help="section.field=value")
    add("--times", type=int, default=5, metavar="N", help="number of starts, each with a resume (default: 5)")
    add("--ranks", type=int, metavar="N", help="ranks to start on this machine (default: as tandem train)")
    add(
        "--folder",
        type=Path,
        default=Path("runs/bench-starts"),
        metavar="DIR",
        help="folder of the runs, which are removed",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print one JSON line on standard output and a table on standard error. Returns 2 if the user made a mistake."""
    arguments = parse_arguments(argv)
    try:
        if arguments.times < 1:
            raise UserError(f"--times: {arguments.times} is less than 1; use 1 or more")
        line = measure(arguments)
    except UserError as error:
        print_stderr(f"tests.rivals.trainer.startup_time: {error}")
        return 2
    print_stderr(format_table(line))
    print(json.dumps(line, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
