"""`tandem report`: one HTML page about a run, or about the difference between two, from the run folder alone.

`plots` draws, `page` writes HTML, `compare` puts two runs side by side; here are the verb and the page of one
run. The page carries its pictures inside and needs no network and no script, so it can be mailed. It is made
from what is there: a run that is still going or was killed has a report too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tandem.trainer import config as configuration
from tandem.trainer.config import RunConfig, UserError
from tandem.trainer.disk import write_whole
from tandem.trainer.metrics.console import duration, short
from tandem.trainer.metrics.history import History, read
from tandem.trainer.tools.report import page, plots

LISTED_STEPS = 200
"""Rows of the table of steps without an update at most; the result counts them all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run folder; writes RUN/report.html")
    compared = "two run folders side by side: where they first differ; writes B/compare-A.html"
    parser.add_argument("--compare", metavar=("A", "B"), nargs=2, type=Path, help=compared)


def run(args: argparse.Namespace) -> None:
    """Every page asked for is written and its path printed. Raises: UserError for a folder that is no run."""
    from tandem.trainer.tools.report import compare

    if not args.runs and not args.compare:
        raise UserError("report: no run named; name run folders, or two with --compare A B")
    for folder in args.runs:
        print(write(folder))
    if args.compare:
        verdict, path = compare.write(*args.compare)
        print(verdict)
        print(path)


def write(folder: Path) -> Path:
    """RUN/report.html and RUN/report/*.png tell the run as far as its metrics go."""
    history = read(folder)
    config = configuration.load(folder / "config.yaml")
    pictures = plots.draw(history, config, folder / "report")
    sections = [
        page.table("Result", result(history)),
        *(page.picture(title, caption, file) for title, caption, file in pictures),
        page.table("Run", facts(config)),
        page.rows("Starts", *_starts(history)),
        page.rows("Rollbacks", *_rollbacks(history)),
        page.rows("Steps without an update", *_skipped(history)),
        page.rows("Checkpoints", *_checkpoints(history)),
        page.table("Environment", _environment(folder)),
        page.source("config.yaml", (folder / "config.yaml").read_text()),
    ]
    path = folder / "report.html"
    write_whole(path, page.document(config.run.name, status(history), sections))
    return path


def status(history: History) -> str:
    """One line: how far the run is and how it ended."""
    first, total = history.starts[0], history.starts[-1]["total_steps"]
    done = history.steps[-1]["step"] if history.steps else first["step"]
    last_time = history.end["time"] if history.end else (history.steps or history.starts)[-1]["time"]
    how = f"ended: {history.end['reason']}" if history.end else "no end on record: still going, or killed"
    return f"step {done} of {total} · {how} · last written {_clock(last_time)}"


def result(history: History) -> dict[str, str]:
    """The numbers to quote."""
    if not history.steps:
        return {"steps": "none finished yet"}
    steps, last = history.steps, history.steps[-1]
    columns = {name: plots.column(steps, name) for name in ("loss", "tokens_per_second", "mfu", "mfu_causal")}
    tail = columns["loss"][-max(1, len(steps) // 50) :]
    seconds = plots.column(steps, "step_seconds").sum()
    numbers = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "loss": f"{plots.mean(tail):.4f} nats, mean of the last {len(tail)} steps",
    }
    if history.validations:
        best = min(history.validations, key=lambda record: float("inf") if record["loss"] is None else record["loss"])
        for name, record in (
            ("last validation loss", history.validations[-1]),
            ("best validation loss", best),
        ):
            numbers[name] = f"{_number(record['loss'], '.4f')} at step {record['step']:,}"
    return numbers | {
        "speed": f"{short(plots.median(columns['tokens_per_second']))} tokens/s, median",
        "mfu": f"{100 * plots.median(columns['mfu']):.1f} % with full attention counted, "
        f"{100 * plots.median(columns['mfu_causal']):.1f} % with its causal half, medians",
        "time in steps": duration(seconds),
        "waiting for data": f"{100 * plots.column(steps, 'data_seconds').sum() / seconds:.2f} % of that",
        "steps done again after restarts": f"{sum(start['repeated_steps'] for start in history.restarts):,}",
        "steps done again after rollbacks": f"{sum(back['repeated_steps'] for back in history.rollbacks):,}",
        "steps without an update": f"{len(history.skipped):,}",
    }


def facts(config: RunConfig) -> dict[str, str]:
    """The config in a few lines, for the head of a page; the whole file stands below."""
    model, schedule, lr = config.model, config.schedule, config.schedule.lr
    phases = "; ".join(f"{p.name}: {short(p.tokens)} tokens as {p.rows} rows of {p.seq_len:,}" for p in schedule.phases)
    return {
        "model": f"{model.family}: depth {model.depth}, width {model.width:,}, heads {model.heads}, "
        f"kv_heads {model.kv_heads}, ffn_width {model.ffn_width:,}, vocab {model.vocab:,}",
        "phases": phases,
        "learning rate": f"{lr.kind}, peak {lr.peak:g}, warm-up {lr.warmup_steps:,} steps",
        "optimizer": f"AdamW, beta {config.optim.beta1:g} / {config.optim.beta2:g}, weight decay "
        f"{config.optim.weight_decay:g}, clip {config.optim.clip_norm:g}",
        "muP": f"base width {config.mup.base_width}" if config.mup else "off",
        "precision": config.run.precision,
        "parallel": f"tp_size {config.parallel.tp_size}, ZeRO stage {config.parallel.zero_stage}, "
        f"recompute {config.parallel.recompute}",
        "hardware": config.hardware.name if config.hardware else "not named",
        "seed": str(config.run.seed),
    }


def _starts(history: History) -> tuple[list[str], list[list[str]]]:
    head = ["when", "from step", "from token", "ranks", "tp_size", "dp_size", "ready after", "steps done again"]
    names = ("step", "tokens", "world_size", "tp_size", "dp_size")
    body = [
        [
            _clock(start["time"]), *(f"{start[name]:,}" for name in names), _ready(start["start_seconds"]),
            f"{start['repeated_steps']:,}",
        ]
        for start in history.starts
    ]  # fmt: skip
    return head, body


def _ready(start_seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start_seconds.items())
    return f"{sum(start_seconds.values()):.1f} s: {parts}" if parts else "-"


def _rollbacks(history: History) -> tuple[list[str], list[list[str]]]:
    head = ["when", "to step", "from step", "reason", "steps done again"]
    body = [
        [
            _clock(back["time"]),
            f"{back['step']:,}",
            f"{back['from_step']:,}",
            back["reason"],
            f"{back['repeated_steps']:,}",
        ]
        for back in history.rollbacks
    ]
    return head, body


def _skipped(history: History) -> tuple[list[str], list[list[str]]]:
    body = [
        [_clock(s["time"]), f"{s['step']:,}", _number(s["loss"], ".4f"), _number(s["gradient_norm"], ".4g")]
        for s in history.skipped[:LISTED_STEPS]
    ]
    return ["when", "step", "loss", "gradient norm"], body


def _checkpoints(history: History) -> tuple[list[str], list[list[str]]]:
    head = ["when", "step", "seconds", "training waited", "size"]
    body = [
        [
            _clock(c["time"]), f"{c['step']:,}", f"{c['seconds']:.1f}",
            "-" if c["stall_seconds"] is None else f"{c['stall_seconds']:.1f} s", f"{short(c['bytes'])}B",
        ]
        for c in history.checkpoints
    ]  # fmt: skip
    return head, body


def _environment(folder: Path) -> dict[str, str]:
    path = folder / "environment.json"
    return _flat(json.loads(path.read_text())) if path.is_file() else {"environment.json": "not written"}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows[prefix + key] = " ".join(map(str, value))
        else:
            rows[prefix + key] = "-" if value is None else str(value)
    return rows


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
