"""Show a run's records on standard error: a live bar on a terminal, plain lines in a file or a pipe.

The time left is the remaining tokens at the wall-clock pace of
the last steps, so it includes validations and checkpoints.
"""

from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tandem.trainer.config.numbers import format_bytes, format_count, format_duration
from tandem.trainer.config.outside import escape_control_characters
from tandem.trainer.metrics import progress

ETA_WINDOW_STEPS = 50
"""Number of steps that determine the pace."""


class ConsoleSink:
    def __init__(self, every_steps: int, console: Console | None = None) -> None:
        self._every_steps = every_steps
        self._console = console or progress.open_screen()
        self._eta_window: deque[tuple[float, int]] = deque(maxlen=ETA_WINDOW_STEPS)
        self._last_step_record: dict[str, Any] | None = None
        self._consumed_tokens_by_step: dict[int, int] = {}
        """Tokens consumed after each step since the last checkpoint, to which the run may roll back."""
        self._last_printed_step = -1
        self._progress_bar: Progress | None = None
        self._totals = {"total_steps": 0, "total_tokens": 0}

    def write(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "start":
                self._show_start(record)
            case "step":
                self._show_step(record)
            case "validation":
                losses = f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.4g}"
                self._print(f"validation at step {record['step']}: {losses}")
            case "checkpoint":
                tokens_by_step = self._consumed_tokens_by_step.items()
                self._consumed_tokens_by_step = {s: tokens for s, tokens in tokens_by_step if s >= record["step"]}
                self._print(
                    f"checkpoint at step {record['step']}: {format_bytes(record['bytes'])} in "
                    f"{record['seconds']:.1f} s, training waited {record['stall_seconds']:.1f} s"
                )
            case "rollback":
                self._show_rollback(record)
            case "end":
                last = self._last_step_record
                if last and self._eta_window and self._last_printed_step != last["step"]:
                    self._print_step(last)
                self._print(f"end at step {record['step']}: {record['reason']}")

    def close(self) -> None:
        if self._progress_bar:
            self._progress_bar.stop()
            self._progress_bar = None

    def _show_start(self, record: dict[str, Any]) -> None:
        self._totals = {name: record[name] for name in self._totals}
        verb = f"resumed at step {record['step']}" if record["step"] else "start at step 0"
        self._print(
            f"{verb} of {record['total_steps']}, {format_count(record['total_tokens'])} tokens in all, "
            f"{record['world_size']} rank{'s' * (record['world_size'] != 1)} "
            f"(tp {record['tp_size']} x dp {record['dp_size']})"
        )
        self._consumed_tokens_by_step = {record["step"]: record["tokens"]}
        if parts := record["start_seconds"]:
            listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
            self._print(f"ready after {sum(parts.values()):.1f} s: {listed}")
        if self._console.is_interactive:
            totals = {"total": record["total_tokens"], "completed": record["tokens"]}
            self._progress_bar = progress.start_wide_bar(self._console, "", **totals, words="first step …")

    def _show_rollback(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self._print(f"rollback to step {step} from step {record['from_step']}: {record['reason']}")
        self._eta_window.clear()
        self._last_printed_step = -1
        self._update_bar(completed=self._consumed_tokens_by_step.get(step, 0), words=f"back at step {step}")

    def _show_step(self, record: dict[str, Any]) -> None:
        new_phase = self._last_step_record is None or self._last_step_record["phase"] != record["phase"]
        self._last_step_record = record
        self._consumed_tokens_by_step[record["step"]] = record["tokens"]
        self._eta_window.append((record["time"], record["tokens"]))
        if new_phase:
            rows = f"{record['global_batch_size']} rows of {record['seq_len']} tokens a step"
            self._print(f"phase {record['phase']}: {rows}")
        words = "  ".join(self._format_step(record))
        self._update_bar(completed=record["tokens"], description=record["phase"], words=words)
        is_due = new_phase or record["step"] % self._every_steps == 0 or record["step"] == self._totals["total_steps"]
        if record["skipped"] or (is_due and not self._progress_bar):
            self._print_step(record)

    def _update_bar(self, **fields: Any) -> None:
        if self._progress_bar:
            self._progress_bar.update(self._progress_bar.task_ids[0], **fields)

    def _print_step(self, record: dict[str, Any]) -> None:
        self._last_printed_step = record["step"]
        if not self._progress_bar or record["skipped"]:
            self._print(" | ".join([record["phase"], *self._format_step(record)]))

    def _format_step(self, record: dict[str, Any]) -> list[str]:
        return [
            f"step {record['step']}/{self._totals['total_steps']}" + " skipped" * record["skipped"],
            f"{format_count(record['tokens'])}/{format_count(self._totals['total_tokens'])} tokens",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"{format_count(record['tokens_per_second'])} tokens/s",
            f"mfu {100 * record['mfu']:.1f}%",
            f"eta {format_duration(self._remaining_seconds(record))}",
        ]

    def _remaining_seconds(self, record: dict[str, Any]) -> float | None:
        (first_time, first_tokens), (last_time, last_tokens) = self._eta_window[0], self._eta_window[-1]
        pace = record["tokens_per_second"]
        if last_time > first_time:
            pace = (last_tokens - first_tokens) / (last_time - first_time)
        return (self._totals["total_tokens"] - record["tokens"]) / pace if pace > 0 else None

    def _print(self, text: str) -> None:
        self._console.print(escape_control_characters(text), markup=False, highlight=False, soft_wrap=True)
