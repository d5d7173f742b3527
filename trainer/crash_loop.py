"""Refuses to start a run that keeps failing at the same step, so that a job queue does not restart it forever.

Each start appends a line to `attempts.jsonl` with the last recorded step, and a second line when it ends cleanly. A start
without the second line has failed, whatever ended its process. The step in the next start's line shows how far it got.

Each line has a check sum. A damaged line counts as a start that failed and had reached the same step as the start before it, so
damage delays a refusal by at most one start. A torn line does not count, because a start begins after its line is on disk.
"""

import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from zlib import crc32

from tandem.trainer import journal
from tandem.trainer.config import UserError, parse_dataclass
from tandem.trainer.config.constraints import COUNT
from tandem.trainer.config.outside import NotAFile, parse_json, read_file
from tandem.trainer.distributed.watchdog import newest_verdict
from tandem.trainer.metrics.records import METRICS_FILE
from tandem.trainer.run_folder import LOCK_FILE, create_run_folder

STARTS_FILE = "attempts.jsonl"
CLEAN_EXIT_CODES: dict[Any, int] = {None: 0, 0: 0, 2: 2}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    kind: Literal["start"]
    id: str
    time: float
    reached: Annotated[int, COUNT]
    """The last recorded step when it began."""
    forgets: bool
    """Whether it resets the count of failures."""


@dataclass(frozen=True)
class End:
    kind: Literal["end"]
    id: str
    time: float
    code: int


@contextmanager
def record_start(folder: Path, max_repeat_failures: int) -> Iterator[None]:
    """Record this start of the run, and its end unless it fails. Only rank 0 enters this.

    Raises: what `check_repeat_failures` raises. If `max_repeat_failures` is 0, this start resets the count.
    """
    created_folders = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    create_run_folder(folder)
    last_step = check_repeat_failures(folder, max_repeat_failures)
    start_id = secrets.token_hex(4)  # another launch may use the folder at the same time
    start = {"kind": "start", "id": start_id, "time": time.time(), "reached": last_step}
    try:
        _append_record(folder, **start, forgets=not max_repeat_failures)
    except OSError as error:
        raise UserError(
            f"{folder / STARTS_FILE}: cannot be written ({error.strerror}); free disk space or correct the permissions"
        ) from None
    code = None  # stays None if the start fails
    try:
        yield
        code = 0
    except UserError:
        code = 2
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except SystemExit as error:
        code = CLEAN_EXIT_CODES.get(error.code)
        raise
    finally:
        if code is not None:
            _record_end(folder, start_id, code)
        if code == 2 and created_folders:
            _remove_new_folders(folder, created_folders)


def check_repeat_failures(folder: Path, max_repeat_failures: int) -> int:
    """Return the last recorded step of the run.

    Raises: UserError if the last `max_repeat_failures` starts failed in the step after it; 0 refuses no start.
    """
    try:
        last_step = _last_recorded_step(folder)
        if max_repeat_failures:
            _refuse_repeat_failures(folder, last_step, max_repeat_failures)
        return last_step
    except NotAFile:
        raise
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); restore the file or correct its permissions"
        ) from None


def _remove_new_folders(folder: Path, created_folders: list[Path]) -> None:
    """Remove the folders that this start created, if a user error ended it before it wrote anything else."""
    files = list(folder.iterdir())
    if {path.name for path in files} <= {STARTS_FILE, LOCK_FILE}:
        for path in files:
            path.unlink()
        for each in created_folders:
            with suppress(OSError):  # another run may use it by now
                each.rmdir()


def _record_end(folder: Path, start_id: str, code: int) -> None:
    try:
        _append_record(folder, kind="end", id=start_id, time=time.time(), code=code)
    except OSError as error:
        log.warning("%s: cannot be written (%s); this start will count as failed", folder / STARTS_FILE, error.strerror)


def _refuse_repeat_failures(folder: Path, last_step: int, max_repeat_failures: int) -> None:
    starts: list[Start] = []
    ended_ids = set()
    for record in _read_attempts(folder / STARTS_FILE):
        if isinstance(record, End):
            ended_ids.add(record.id)
        else:
            starts = [record] if record.forgets else [*starts, record]
    recent_starts = starts[-max_repeat_failures:]
    steps_reached = [start.reached for start in recent_starts[1:]] + [last_step]
    if (
        len(recent_starts) < max_repeat_failures
        or any(start.id in ended_ids for start in recent_starts)
        or set(steps_reached) != {last_step}
    ):
        return
    verdict = newest_verdict(folder, since=recent_starts[-1].time)
    cause = f"the verdict on the last hang was: {verdict}" if verdict else "see the log for the cause"
    subject = f"{max_repeat_failures} starts in a row have" if max_repeat_failures > 1 else "the last start has"
    raise UserError(
        f"run.max_repeat_failures: {subject} failed in step {last_step + 1} of {folder}; {cause}; "
        "correct the cause, then start once with run.max_repeat_failures=0"
    )


def _read_attempts(path: Path) -> Iterator[Start | End]:
    """Yield the records of `attempts.jsonl`, and a failed start for each damaged line. See the module's text."""
    reached = 0
    content = read_file(path) if path.exists() else b""
    for line in re.split(rb"\n|(?<=\}).(?=\{)", content, flags=re.DOTALL):  # the newline itself may be damaged
        is_torn = line.startswith(b"{") and not line.endswith(b"}") and b'"check"' not in line
        if is_torn or not line.strip(b"\0"):
            continue
        record = _parse_record(line) or Start("start", "", math.inf, reached, False)
        reached = record.reached if isinstance(record, Start) else reached
        yield record


def _parse_record(line: bytes) -> Start | End | None:
    """Return the record, or None if the line is damaged. Records of older versions have no check sum."""
    try:
        tree = parse_json(line)
        if tree.pop("check", None) not in (None, _check_sum(tree)):
            return None
        record: Start | End = parse_dataclass({"start": Start, "end": End}[tree["kind"]], tree, "")
        return record
    except (ValueError, KeyError, TypeError):
        return None


def _last_recorded_step(folder: Path) -> int:
    """Return the step of the last step record. After a rollback this is not the highest step."""
    records = journal.read_records_backwards(folder / METRICS_FILE)
    steps = (record.get("step") for record in records if record.get("kind") == "step")
    return next((step for step in steps if type(step) is int and step >= 0), 0)


def _append_record(folder: Path, **record: Any) -> None:
    with journal.open_journal(folder / STARTS_FILE) as file:
        journal.append_record(file, record | {"check": _check_sum(record)}, sync=True)


def _check_sum(record: dict[str, Any]) -> str:
    return f"{crc32(json.dumps(record).encode()):08x}"
