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
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.disk import atomic_write
from tandem.trainer.metrics.console import format_duration, format_number
from tandem.trainer.metrics.history import RunHistory, read_history
from tandem.trainer.tools.report import page, plots

MAX_LISTED_STEPS = 200
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
        print(write_report(folder))
    if args.compare:
        summary, path = compare.write_comparison(*args.compare)
        print(summary)
        print(path)


def write_report(folder: Path) -> Path:
    """RUN/report.html and RUN/report/*.png tell the run as far as its metrics go."""
    history = read_history(folder)
    config = configuration.load_config(folder / "config.yaml")
    pictures = plots.draw_all(history, config, folder / "report")
    sections = [
        page.key_value_table("Result", headline_numbers(history)),
        *(page.picture(title, caption, file) for title, caption, file in pictures),
        page.key_value_table("Run", config_summary(config)),
        page.data_table("Starts", *_start_rows(history)),
        page.data_table("Rollbacks", *_rollback_rows(history)),
        page.data_table("Steps without an update", *_skipped_step_rows(history)),
        page.data_table("Checkpoints", *_checkpoint_rows(history)),
        page.key_value_table("Environment", _environment_fields(folder)),
        page.collapsible_text("config.yaml", (folder / "config.yaml").read_text()),
    ]
    path = folder / "report.html"
    atomic_write(path, page.html_page(config.run.name, status(history), sections))
    return path


def status(history: RunHistory) -> str:
    """One line: how far the run is and how it ended."""
    first, total = history.starts[0], history.starts[-1]["total_steps"]
    finished_steps = history.steps[-1]["step"] if history.steps else first["step"]
    last_time = history.end_record["time"] if history.end_record else (history.steps or history.starts)[-1]["time"]
    end_state = (
        f"ended: {history.end_record['reason']}" if history.end_record else "no end on record: still going, or killed"
    )
    return f"step {finished_steps} of {total} · {end_state} · last written {_format_time(last_time)}"


def headline_numbers(history: RunHistory) -> dict[str, str]:
    """The numbers to quote."""
    if not history.steps:
        return {"steps": "none finished yet"}
    steps, last = history.steps, history.steps[-1]
    columns = {name: plots.column(steps, name) for name in ("loss", "tokens_per_second", "mfu", "mfu_causal")}
    last_losses = columns["loss"][-max(1, len(steps) // 50) :]
    seconds = plots.column(steps, "step_seconds").sum()
    numbers = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "loss": f"{plots.finite_mean(last_losses):.4f} nats, mean of the last {len(last_losses)} steps",
    }
    if history.validations:
        best = min(history.validations, key=lambda record: float("inf") if record["loss"] is None else record["loss"])
        for name, record in (
            ("last validation loss", history.validations[-1]),
            ("best validation loss", best),
        ):
            numbers[name] = f"{_format_number(record['loss'], '.4f')} at step {record['step']:,}"
    return numbers | {
        "speed": f"{format_number(plots.finite_median(columns['tokens_per_second']))} tokens/s, median",
        "mfu": f"{100 * plots.finite_median(columns['mfu']):.1f} % with full attention counted, "
        f"{100 * plots.finite_median(columns['mfu_causal']):.1f} % with its causal half, medians",
        "time in steps": format_duration(seconds),
        "waiting for data": f"{100 * plots.column(steps, 'data_seconds').sum() / seconds:.2f} % of that",
        "steps done again after restarts": f"{sum(start['repeated_steps'] for start in history.restarts):,}",
        "steps done again after rollbacks": f"{sum(back['repeated_steps'] for back in history.rollbacks):,}",
        "steps without an update": f"{len(history.skipped_steps):,}",
    }


def config_summary(config: TrainConfig) -> dict[str, str]:
    """The config in a few lines, for the head of a page; the whole file stands below."""
    model, schedule, lr = config.model, config.schedule, config.schedule.lr
    phases = "; ".join(
        f"{p.name}: {format_number(p.tokens)} tokens as {p.global_batch_size} rows of {p.seq_len:,}"
        for p in schedule.phases
    )
    return {
        "model": f"{model.family}: num_layers {model.num_layers}, hidden_size {model.hidden_size:,}, "
        f"num_heads {model.num_heads}, num_kv_heads {model.num_kv_heads}, "
        f"ffn_hidden_size {model.ffn_hidden_size:,}, vocab_size {model.vocab_size:,}",
        "phases": phases,
        "learning rate": f"{lr.kind}, peak {lr.peak:g}, warm-up {lr.warmup_steps:,} steps",
        "optimizer": f"AdamW, beta {config.optim.beta1:g} / {config.optim.beta2:g}, weight decay "
        f"{config.optim.weight_decay:g}, clip {config.optim.max_grad_norm:g}",
        "muP": f"base width {config.mup.base_hidden_size}" if config.mup else "off",
        "precision": config.run.precision,
        "parallel": f"tp_size {config.parallel.tp_size}, ZeRO stage {config.parallel.zero_stage}, "
        f"recompute {config.parallel.recompute}",
        "hardware": config.hardware.name if config.hardware else "not named",
        "seed": str(config.run.seed),
    }


def _start_rows(history: RunHistory) -> tuple[list[str], list[list[str]]]:
    head = ["when", "from step", "from token", "ranks", "tp_size", "dp_size", "ready after", "steps done again"]
    names = ("step", "tokens", "world_size", "tp_size", "dp_size")
    body = [
        [
            _format_time(start["time"]), *(f"{start[name]:,}" for name in names),
            _format_startup_seconds(start["start_seconds"]),
            f"{start['repeated_steps']:,}",
        ]
        for start in history.starts
    ]  # fmt: skip
    return head, body


def _format_startup_seconds(start_seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start_seconds.items())
    return f"{sum(start_seconds.values()):.1f} s: {parts}" if parts else "-"


def _rollback_rows(history: RunHistory) -> tuple[list[str], list[list[str]]]:
    head = ["when", "to step", "from step", "reason", "steps done again"]
    body = [
        [
            _format_time(back["time"]),
            f"{back['step']:,}",
            f"{back['from_step']:,}",
            back["reason"],
            f"{back['repeated_steps']:,}",
        ]
        for back in history.rollbacks
    ]
    return head, body


def _skipped_step_rows(history: RunHistory) -> tuple[list[str], list[list[str]]]:
    body = [
        [
            _format_time(s["time"]),
            f"{s['step']:,}",
            _format_number(s["loss"], ".4f"),
            _format_number(s["grad_norm"], ".4g"),
        ]
        for s in history.skipped_steps[:MAX_LISTED_STEPS]
    ]
    return ["when", "step", "loss", "gradient norm"], body


def _checkpoint_rows(history: RunHistory) -> tuple[list[str], list[list[str]]]:
    head = ["when", "step", "seconds", "training waited", "size"]
    body = [
        [
            _format_time(c["time"]), f"{c['step']:,}", f"{c['seconds']:.1f}",
            "-" if c["stall_seconds"] is None else f"{c['stall_seconds']:.1f} s", f"{format_number(c['bytes'])}B",
        ]
        for c in history.checkpoints
    ]  # fmt: skip
    return head, body


def _environment_fields(folder: Path) -> dict[str, str]:
    path = folder / "environment.json"
    return _flatten(json.loads(path.read_text())) if path.is_file() else {"environment.json": "not written"}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            rows |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows[prefix + key] = " ".join(map(str, value))
        else:
            rows[prefix + key] = "-" if value is None else str(value)
    return rows


def _format_number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
