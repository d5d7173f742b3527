"""Read a run folder's metrics.jsonl, without the records that later starts and rollbacks undid."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tandem.trainer import journal
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import open_regular_file, read_lines
from tandem.trainer.metrics.records import METRICS_FILE, StepRecord

log = logging.getLogger(__name__)

RECORD_DEFAULTS: dict[str, dict[str, Any]] = {
    "start": {"start_seconds": {}}, "step": {"skipped": False}, "checkpoint": {"stall_seconds": None},
}  # fmt: skip
"""Values of fields that records of older runs lack, by kind of record."""
_COUNTS = dict.fromkeys(("step", "tokens", "world_size", "tp_size", "dp_size", "total_steps", "total_tokens"), int)
RECORD_TYPES: dict[str, dict[str, Any]] = {
    "start": _COUNTS | {"start_seconds": dict},
    "step": get_type_hints(StepRecord),
    "validation": {"step": int, "tokens": int, "loss": float, "perplexity": float},
    "checkpoint": {"step": int, "seconds": float, "stall_seconds": float, "bytes": int},
    "rollback": {"step": int, "from_step": int, "reason": str},
    "end": {"step": int, "reason": str},
}
"""Fields of each kind of record. All have `time`, too, and null stands for a float that was not finite."""
END_OF_TIME = 253_402_300_800
"""The year 10,000 as a Unix time. Later times have no date."""


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


def last_learning_rate(folder: Path, step: int) -> float | None:
    """Return the learning rate of the last update before a checkpoint of `step`, or None if it is not recorded."""
    records = journal.read_records_backwards(folder / METRICS_FILE)
    found = next((record for record in records if record.get("kind") == "step" and record.get("step") == step), {})
    return found["lr"] if isinstance(found.get("lr"), float) else None


def read_history(folder: Path) -> RunHistory:
    """Read the history of a run, which may still be going or have been killed.

    Damaged lines are left out with a warning.
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
    """Yield the records, without damaged lines.

    Raises: UserError if no record of a step has the fields of this version.
    """
    damaged, num_steps, has_other_steps = [], 0, False
    with open_regular_file(path) as file:
        for number, line in enumerate(read_lines(file), 1):
            record = journal.parse_record(line)
            kind = record.get("kind")
            record = RECORD_DEFAULTS.get(kind, {}) | record if isinstance(kind, str) else {}
            if _is_valid(record):
                num_steps += kind == "step"
                yield record
            elif line.rstrip().endswith(b"}"):  # any other line was torn by a kill
                damaged.append(number)
                has_other_steps |= kind == "step"
    if has_other_steps and not num_steps:
        remedy = "read it with the version that wrote it"
        raise UserError(f"{path}: was written by a version with other field names; {remedy}")
    if damaged:
        log.warning("%s: %d damaged lines are left out, the first is line %d", path, len(damaged), damaged[0])


def _is_valid(record: dict[str, Any]) -> bool:
    types = RECORD_TYPES.get(record.get("kind", ""))
    if types is None or not all(name in record and _has_type(record[name], types[name]) for name in types):
        return False
    time = record.get("time")
    return isinstance(time, int | float) and type(time) is not bool and 0 <= time < END_OF_TIME


def _has_type(value: Any, wanted: Any) -> bool:
    if wanted is int:
        return type(value) is int and 0 <= value < 1 << 63
    if wanted is dict:
        return type(value) is dict and all(each is not None and _has_type(each, float) for each in value.values())
    if wanted in (str, bool):
        return type(value) is wanted
    return value is None or type(value) is float or (type(value) is int and abs(value) < 1 << 63)
