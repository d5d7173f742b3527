"""Progress on standard error: a live bar where that is a terminal, plain lines where it is a file or a pipe.

Reads the same dicts that go to `metrics.jsonl`; formats numbers for people (`short`, `duration`). The time
left is the tokens left at the pace of the last steps by the clock, so validation and checkpoints count.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tandem.trainer.metrics import progress

PACE_STEPS = 50
"""Steps the pace is taken over."""


def short(value: float | int) -> str:
    """Three significant digits with k, M, B (10^9) or T (10^12)."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | int | None) -> str:
    """Days, hours, minutes, seconds; a dash for null or what is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}:{minutes:02}:{rest:02}"


class ConsoleSink:
    def __init__(self, every_steps: int, screen: Console | None = None) -> None:
        self._every_steps = every_steps
        self._screen = screen or Console(stderr=True)
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS)
        self._last: dict[str, Any] | None = None
        self._tokens: dict[int, int] = {}
        """Behind the run after each step from the last checkpoint on, to which it may go back."""
        self._shown_step = -1
        self._bar: Progress | None = None
        self._totals = {"total_steps": 0, "total_tokens": 0}

    def write(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self._start(record)
        elif kind == "step":
            self._step(record)
        elif kind == "validation":
            losses = f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.4g}"
            self._say(f"validation at step {record['step']}: {losses}")
        elif kind == "checkpoint":
            self._tokens = {step: tokens for step, tokens in self._tokens.items() if step >= record["step"]}
            self._say(
                f"checkpoint at step {record['step']}: {short(record['bytes'])}B in {record['seconds']:.1f} s, "
                f"training waited {record['stall_seconds']:.1f} s"
            )
        elif kind == "rollback":
            self._rollback(record)
        elif kind == "end":
            if self._last and self._pace and self._shown_step != self._last["step"]:
                self._line(self._last)
            self._say(f"end at step {record['step']}: {record['reason']}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _start(self, record: dict[str, Any]) -> None:
        self._totals = {name: record[name] for name in self._totals}
        verb = f"resumed at step {record['step']}" if record["step"] else "start at step 0"
        self._say(
            f"{verb} of {record['total_steps']}, {short(record['total_tokens'])} tokens in all, "
            f"{record['world_size']} ranks (tp {record['tp_size']} x dp {record['dp_size']})"
        )
        self._tokens = {record["step"]: record["tokens"]}
        if parts := record["start_seconds"]:
            listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
            self._say(f"ready after {sum(parts.values()):.1f} s: {listed}")
        if not self._screen.is_interactive:
            return
        total, tokens = record["total_tokens"], record["tokens"]
        self._bar = progress.across(self._screen, "", total, completed=tokens, words="first step …")

    def _rollback(self, record: dict[str, Any]) -> None:
        self._say(f"rollback to step {record['step']} from step {record['from_step']}: {record['reason']}")
        self._pace.clear()
        self._shown_step = -1
        if self._bar:
            tokens = self._tokens.get(record["step"], 0)
            self._bar.update(self._bar.task_ids[0], completed=tokens, words=f"back at step {record['step']}")

    def _step(self, record: dict[str, Any]) -> None:
        new_phase = self._last is None or self._last["phase"] != record["phase"]
        self._last = record
        self._tokens[record["step"]] = record["tokens"]
        self._pace.append((record["time"], record["tokens"]))
        if new_phase:
            self._say(f"phase {record['phase']}: {record['rows']} rows of {record['seq_len']} tokens a step")
        if self._bar:
            words, [task] = "  ".join(self._numbers(record)), self._bar.task_ids
            self._bar.update(task, completed=record["tokens"], description=record["phase"], words=words)
        due = new_phase or record["step"] % self._every_steps == 0 or record["step"] == self._totals["total_steps"]
        if record["skipped"] or (due and not self._bar):
            self._line(record)

    def _line(self, record: dict[str, Any]) -> None:
        self._shown_step = record["step"]
        if not self._bar or record["skipped"]:
            self._say(" | ".join([record["phase"], *self._numbers(record)]))

    def _numbers(self, record: dict[str, Any]) -> list[str]:
        return [
            f"step {record['step']}/{self._totals['total_steps']}" + " skipped" * record["skipped"],
            f"{short(record['tokens'])}/{short(self._totals['total_tokens'])} tokens",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"{short(record['tokens_per_second'])} tokens/s",
            f"mfu {100 * record['mfu']:.1f}%",
            f"eta {duration(self._left_seconds(record))}",
        ]

    def _left_seconds(self, record: dict[str, Any]) -> float | None:
        (then, before), (now, tokens) = self._pace[0], self._pace[-1]
        rate = (tokens - before) / (now - then) if now > then else record["tokens_per_second"]
        return (self._totals["total_tokens"] - record["tokens"]) / rate if rate > 0 else None

    def _say(self, text: str) -> None:
        self._screen.print(text, markup=False, highlight=False, soft_wrap=True)
