"""A run folder's metrics.jsonl read back, without what later starts and rollbacks took back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.trainer import journal
from tandem.trainer.config import UserError
from tandem.trainer.metrics.records import METRICS_FILE

RECORD_DEFAULTS: dict[str, dict[str, Any]] = {
    "start": {"start_seconds": {}}, "step": {"skipped": False}, "checkpoint": {"stall_seconds": None},
}  # fmt: skip
"""What records of runs made before these fields existed are read as."""


@dataclass(frozen=True)
class RunHistory:
    """What a run folder tells, in order of steps, without what a later start or rollback took back."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """Every start; each has `repeated_steps`, the finished steps that it took back."""
    rollbacks: list[dict[str, Any]]
    """Every time the run went back by itself; with `repeated_steps` as a start, and `tokens` behind the run at its step."""
    end_record: dict[str, Any] | None
    """null: still running, or crashed."""

    @property
    def restarts(self) -> list[dict[str, Any]]:
        return self.starts[1:]

    @property
    def skipped_steps(self) -> list[dict[str, Any]]:
        """The steps whose update was left out and that no rollback took back."""
        return [record for record in self.steps if record["skipped"]]


def has_validation(folder: Path, step: int) -> bool:
    """Whether the folder has a validation of `step` on record."""
    path, found = folder / METRICS_FILE, False
    for record in _read_records(path) if path.is_file() else []:
        if record["kind"] == "validation" and record["step"] == step:
            found = True
        elif record["kind"] in ("start", "rollback") and record["step"] < step:
            found = False  # taken back
    return found


def read_history(folder: Path) -> RunHistory:
    """The history in the folder's metrics.jsonl, also of a run that is going or was killed.

    Raises: UserError where there is no run, or none that has started.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        problem = f"has no {METRICS_FILE}; a run folder has" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; name the folder of a run that has started")
    records_by_kind: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}, "checkpoint": {}}
    starts: list[dict[str, Any]] = []
    rollbacks: list[dict[str, Any]] = []
    end = None
    for record in _read_records(path):
        kind, step = record["kind"], record["step"]
        if kind in ("start", "rollback"):
            record["repeated_steps"] = sum(late > step for late in records_by_kind["step"])
            records_by_kind = {
                name: {s: old for s, old in by.items() if s <= step} for name, by in records_by_kind.items()
            }
            end = None
            if kind == "start":
                starts.append(record)
            else:
                rollbacks.append({**record, "tokens": _consumed_tokens_at(step, records_by_kind["step"], starts)})
        elif kind == "end":
            end = record
        elif kind == "step" and "grad_norm" not in record:
            raise UserError(
                f"{path}: has records of a version with other names; read it with the version that wrote it"
            )
        else:
            records_by_kind[kind][step] = record
    if not starts:
        raise UserError(f"{path}: has no start record; the run died before its first step; see its log")
    steps, validations, checkpoints = ([by[step] for step in sorted(by)] for by in records_by_kind.values())
    return RunHistory(steps, validations, checkpoints, starts, rollbacks, end)


def _consumed_tokens_at(step: int, steps: dict[int, dict[str, Any]], starts: list[dict[str, Any]]) -> int:
    """Behind the run after `step`, which it has made or was started from."""
    tokens = (record["tokens"] for record in (steps.get(step), *reversed(starts)) if record and record["step"] == step)
    return next(tokens, 0)


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    for record in journal.read_records(path):
        yield RECORD_DEFAULTS.get(record["kind"], {}) | record
