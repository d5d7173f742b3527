"""Read a run folder's metrics.jsonl, without the records that later starts and rollbacks undid."""

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
"""Values of fields that records of older runs lack, by kind of record."""


@dataclass(frozen=True)
class RunHistory:
    """The records of a run, in order of steps, without those that a later start or rollback undid."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """Every start. `repeated_steps` is the number of finished steps that it undid."""
    rollbacks: list[dict[str, Any]]
    """Every rollback, also with `repeated_steps`, and with `tokens`, the tokens consumed up to its step."""
    end_record: dict[str, Any] | None
    """None if the run is still going or crashed."""

    @property
    def restarts(self) -> list[dict[str, Any]]:
        return self.starts[1:]

    @property
    def skipped_steps(self) -> list[dict[str, Any]]:
        """The steps whose update was skipped and that no rollback undid."""
        return [record for record in self.steps if record["skipped"]]


def has_validation(folder: Path, step: int) -> bool:
    """Whether the run has validated after `step` and has not gone back before it since."""
    path, found = folder / METRICS_FILE, False
    for record in _read_records(path) if path.is_file() else []:
        if record["kind"] == "validation" and record["step"] == step:
            found = True
        elif record["kind"] in ("start", "rollback") and record["step"] < step:
            found = False
    return found


def read_history(folder: Path) -> RunHistory:
    """Read the history of a run, which may still be going or have been killed.

    Raises: UserError if the folder has no run, or one that never started.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        problem = f"has no {METRICS_FILE}" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; name the folder of a run that has started")
    records_by_kind: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}, "checkpoint": {}}
    starts: list[dict[str, Any]] = []
    rollbacks: list[dict[str, Any]] = []
    end = None
    for record in _read_records(path):
        kind, step = record["kind"], record["step"]
        if kind in ("start", "rollback"):
            record["repeated_steps"] = sum(late > step for late in records_by_kind["step"])
            for kept in records_by_kind.values():
                for undone in [later for later in kept if later > step]:
                    del kept[undone]
            end = None
            if kind == "start":
                starts.append(record)
            else:
                rollbacks.append({**record, "tokens": _consumed_tokens_at(step, records_by_kind["step"], starts)})
        elif kind == "end":
            end = record
        elif kind == "step" and "grad_norm" not in record:
            remedy = "read it with the version that wrote it"
            raise UserError(f"{path}: was written by a version with other field names; {remedy}")
        else:
            records_by_kind[kind][step] = record
    if not starts:
        raise UserError(f"{path}: has no start record because the run ended before its first step; see its log")
    steps, validations, checkpoints = ([by[step] for step in sorted(by)] for by in records_by_kind.values())
    return RunHistory(steps, validations, checkpoints, starts, rollbacks, end)


def _consumed_tokens_at(step: int, steps: dict[int, dict[str, Any]], starts: list[dict[str, Any]]) -> int:
    """The tokens consumed up to `step`, which the run has finished or was started from."""
    tokens = (record["tokens"] for record in (steps.get(step), *reversed(starts)) if record and record["step"] == step)
    return next(tokens, 0)


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    for record in journal.read_records(path):
        yield RECORD_DEFAULTS.get(record["kind"], {}) | record
