"""`python -m tests.rivals.trainer.startup_time CONFIG`: seconds of `tandem train` to its first step, anew or resumed.

Real commands, in processes of their own, each start followed by a resume of the same run. The parts are those that the run
itself puts into the start record of metrics.jsonl; the step that follows is counted too, for a first step warms up what later
ones find warm.
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
    """Parts of the start that the command makes, in their order, its first step, and all of it from the command on."""
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
    """The commands have been run; returns their line."""
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
    """`tandem train` up to that step."""
    ranks = ["--ranks", str(arguments.ranks)] if arguments.ranks else []
    bench_overrides = [field.format(step=step) for field in BENCH_OVERRIDES]
    words = [str(arguments.config), *arguments.overrides, f"run.root={arguments.folder}", *bench_overrides, *ranks]
    return [sys.executable, "-m", "tandem.trainer", "train", *words]


def format_table(result: dict[str, Any]) -> str:
    """The medians, a row for each part."""
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
        "tests.rivals.trainer.startup_time", description="How long a start and a resume take."
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file of a run; its corpus has to be there")
    add("overrides", nargs="*", help="section.field=value")
    add("--times", type=int, default=5, metavar="N", help="starts, and as many resumes (default 5)")
    add("--ranks", type=int, metavar="N", help="ranks to start on this machine (default: as tandem train)")
    add("--folder", type=Path, default=Path("runs/bench-starts"), metavar="DIR", help="of the runs, which are removed")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints one JSON line on standard output and a table on standard error; 2 for a mistake of the user's."""
    arguments = parse_arguments(argv)
    try:
        if arguments.times < 1:
            raise UserError(f"--times: {arguments.times}; must be at least 1; change it")
        line = measure(arguments)
    except UserError as error:
        print_stderr(f"tests.rivals.trainer.startup_time: {error}")
        return 2
    print_stderr(format_table(line))
    print(json.dumps(line, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
