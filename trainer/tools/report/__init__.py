"""`tandem report`: write one HTML page about a run, or about the difference between two, from the run folder alone.

This module has the command and the page of one run; `plots` draws, `page` builds HTML, and `compare` compares two runs. A page
contains its pictures and needs neither network nor scripts, so it can be sent by mail. A report also works for a run that is
still going or was killed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.trainer import config as configuration
from tandem.trainer.checkpoint.compatibility import check_run_folder_model
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.config.addresses import hide_secrets
from tandem.trainer.config.numbers import format_bytes, format_count, format_duration
from tandem.trainer.config.outside import read_text, safe_print
from tandem.trainer.disk import atomic_write
from tandem.trainer.metrics.history import RunHistory, read_history
from tandem.trainer.run_folder import ENVIRONMENT_FILE, read_environment
from tandem.trainer.tools.report import page, plots

MAX_LISTED_STEPS = 200
"""Largest number of rows in the table of skipped steps. The result counts all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run folder; writes RUN/report.html")
    compare_help = "compare two run folders and find where they first differ; writes B/compare-A.html"
    parser.add_argument("--compare", metavar=("A", "B"), nargs=2, type=Path, help=compare_help)


def run(args: argparse.Namespace) -> None:
    """Write the requested pages and print their paths. Raises: UserError if a folder is not a run."""
    from tandem.trainer.tools.report import compare

    if not args.runs and not args.compare:
        raise UserError("report: no run folder is named; name at least one, or use --compare A B")
    for folder in args.runs:
        safe_print(str(write_report(folder)))
    if args.compare:
        safe_print("\n".join(map(str, compare.write_comparison(*args.compare))))


def write_report(folder: Path) -> Path:
    """Write RUN/report.html and RUN/report/*.png from the metrics written so far."""
    history = read_history(folder)
    config = configuration.load_saved_config(folder / "config.yaml")
    check_run_folder_model(config, folder)
    sections = [
        page.key_value_table("Result", headline_numbers(history)),
        *(page.picture(*picture) for picture in plots.draw_all(history, config, folder / "report")),
        page.key_value_table("Run", config_summary(config)),
        page.data_table("Starts", START_COLUMNS, history.starts),
        page.data_table("Rollbacks", ROLLBACK_COLUMNS, history.rollbacks),
        page.data_table("Skipped steps", SKIPPED_STEP_COLUMNS, history.skipped_steps[:MAX_LISTED_STEPS]),
        page.data_table("Checkpoints", CHECKPOINT_COLUMNS, history.checkpoints),
        page.key_value_table("Environment", environment_rows(folder)),
        page.collapsible_text("config.yaml", read_text(folder / "config.yaml")),
    ]  # fmt: skip
    path = folder / "report.html"
    atomic_write(path, hide_secrets(page.html_page(config.run.name, status(history), sections)))
    return path


def status(history: RunHistory) -> str:
    """Describe in one line how far the run is and how it ended."""
    end = history.end_record
    finished_steps = history.steps[-1]["step"] if history.steps else history.starts[0]["step"]
    last = end or (history.steps or history.starts)[-1]
    end_state = f"ended: {end['reason']}" if end else "no end recorded: still running, or killed"
    steps = f"step {finished_steps} of {history.starts[-1]['total_steps']}"
    return f"{steps} · {end_state} · last written {_format_time(last)}"


def headline_numbers(history: RunHistory) -> dict[str, str]:
    """Return the most important results of a run."""
    if not history.steps:
        return {"steps": "none finished yet"}
    steps, last = history.steps, history.steps[-1]
    last_losses = plots.column(steps, "loss")[-max(1, len(steps) // 50) :]
    finite_losses = plots.finite_values(last_losses)
    mean = finite_losses.mean() if len(finite_losses) else float("nan")
    seconds, data_seconds = (plots.column(steps, name).sum() for name in ("step_seconds", "data_seconds"))
    medians = (plots.finite_median(plots.column(steps, name)) for name in ("tokens_per_second", "mfu", "mfu_causal"))
    speed, mfu, mfu_causal = medians
    numbers = {
        "steps": f"{last['step']:,}", "tokens": f"{last['tokens']:,}",
        "loss": f"{mean:.4f} nats, mean of the last {len(last_losses)} steps",
    }  # fmt: skip
    if history.validations:
        best = min(history.validations, key=lambda record: float("inf") if record["loss"] is None else record["loss"])
        for name, record in (("last validation loss", history.validations[-1]), ("best validation loss", best)):
            numbers[name] = f"{_format_number(record['loss'], '.4f')} nats at step {record['step']:,}"
    return numbers | {
        "throughput": f"{format_count(speed)} tokens/s, median",
        "MFU": f"{100 * mfu:.1f} % with full attention, {100 * mfu_causal:.1f} % with its causal half, medians",
        "time in steps": format_duration(seconds),
        "waiting for data": f"{100 * data_seconds / seconds:.2f} % of the time in steps",
        "steps repeated after restarts": f"{sum(start['repeated_steps'] for start in history.restarts):,}",
        "steps repeated after rollbacks": f"{sum(rollback['repeated_steps'] for rollback in history.rollbacks):,}",
        "skipped steps": f"{len(history.skipped_steps):,}",
    }


def config_summary(config: TrainConfig) -> dict[str, str]:
    """Summarize the config. The page also has the whole file."""
    model, optim, parallel, lr = config.model, config.optim, config.parallel, config.schedule.lr
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
    return {
        "model": f"{model.family}: " + ", ".join(f"{name} {getattr(model, name):,}" for name in sizes),
        "phases": "; ".join(
            f"{phase.name}: {format_count(phase.tokens)} tokens, {phase.global_batch_size} rows of {phase.seq_len:,} a step"
            for phase in config.schedule.phases
        ),
        "learning rate": f"{lr.kind}, peak {lr.peak:g}, warm-up {lr.warmup_steps:,} steps",
        "optimizer": f"AdamW, beta {optim.beta1:g} / {optim.beta2:g}, weight decay {optim.weight_decay:g}, "
        f"clip {optim.max_grad_norm:g}",
        "muP": f"base width {config.mup.base_hidden_size:g}" if config.mup else "off",
        "precision": config.run.precision,
        "parallel": f"tp_size {parallel.tp_size}, ZeRO stage {parallel.zero_stage}, recompute {parallel.recompute}",
        "hardware": config.hardware.name if config.hardware else "not configured",
        "seed": str(config.run.seed),
    }


Record = dict[str, Any]


def _format_number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _format_time(record: Record) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))


def _format_startup_seconds(start: Record) -> str:
    parts = start["start_seconds"]
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"{sum(parts.values()):.1f} s: {listed}" if parts else "-"


START_COLUMNS: dict[str, Callable[[Record], str]] = {
    "time": _format_time, "from step": "{step:,}".format_map, "from token": "{tokens:,}".format_map,
    "ranks": "{world_size:,}".format_map, "tp_size": "{tp_size:,}".format_map, "dp_size": "{dp_size:,}".format_map,
    "start-up time": _format_startup_seconds, "repeated steps": "{repeated_steps:,}".format_map,
}  # fmt: skip
ROLLBACK_COLUMNS: dict[str, Callable[[Record], str]] = {
    "time": _format_time, "to step": "{step:,}".format_map, "from step": "{from_step:,}".format_map,
    "reason": "{reason}".format_map, "repeated steps": "{repeated_steps:,}".format_map,
}  # fmt: skip
SKIPPED_STEP_COLUMNS: dict[str, Callable[[Record], str]] = {
    "time": _format_time, "step": "{step:,}".format_map,
    "loss (nats per token)": lambda record: _format_number(record["loss"], ".4f"),
    "gradient norm": lambda record: _format_number(record["grad_norm"], ".4g"),
}  # fmt: skip
CHECKPOINT_COLUMNS: dict[str, Callable[[Record], str]] = {
    "time": _format_time, "step": "{step:,}".format_map,
    "save time (s)": lambda record: _format_number(record["seconds"], ".1f"),
    "training stalled": lambda record: "-" if record["stall_seconds"] is None else f"{record['stall_seconds']:.1f} s",
    "size": lambda record: format_bytes(record["bytes"]),
}  # fmt: skip
"""Heading -> cell of a record."""


def environment_rows(folder: Path) -> dict[str, str]:
    """Return the rows of environment.json, or one row that states why it cannot be read: nothing else depends on it."""
    try:
        environment = read_environment(folder)
    except (OSError, ValueError) as error:
        return {ENVIRONMENT_FILE: f"cannot be read: {error}"}
    if environment is None:
        return {ENVIRONMENT_FILE: "not written"}
    rows = {name: value for name, value in vars(environment).items() if name not in ("command", "packages")}
    rows |= {"command": " ".join(environment.command)}
    rows |= {f"packages.{name}": version for name, version in environment.packages.items()}
    return {name: "-" if value is None else str(value) for name, value in rows.items()}
