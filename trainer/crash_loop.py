"""Refuses to start a run that keeps failing at the same step, so that a job queue does not restart it forever.

Each start appends a line to `attempts.jsonl` with the last recorded step, and a second line when it ends cleanly. A start
without the second line has failed, whatever ended its process. The step in the next start's line shows how far it got.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tandem.trainer import journal
from tandem.trainer.config import UserError
from tandem.trainer.distributed.watchdog import newest_verdict
from tandem.trainer.metrics.records import METRICS_FILE
from tandem.trainer.run_folder import LOCK_FILE, create_run_folder

STARTS_FILE = "attempts.jsonl"
CLEAN_EXIT_CODES: dict[Any, int] = {None: 0, 0: 0, 2: 2}

log = logging.getLogger(__name__)


@contextmanager
def record_start(folder: Path, max_repeat_failures: int) -> Iterator[None]:
    """Record this start of the run, and its end unless it fails. Only rank 0 enters this.

    Raises: UserError if the last `max_repeat_failures` starts failed at one step. 0 refuses no start and resets the count.
    """
    created_folders = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    create_run_folder(folder)
    last_step = _last_recorded_step(folder)
    if max_repeat_failures:
        _check_repeat_failures(folder, last_step, max_repeat_failures)
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


def _check_repeat_failures(folder: Path, last_step: int, max_repeat_failures: int) -> None:
    starts: list[dict[str, Any]] = []
    ended_ids = set()
    for record in journal.read_records(folder / STARTS_FILE):
        if record["kind"] == "end":
            ended_ids.add(record["id"])
        else:
            starts = [record] if record["forgets"] else [*starts, record]
    recent_starts = starts[-max_repeat_failures:]
    steps_reached = [start["reached"] for start in recent_starts[1:]] + [last_step]
    if (
        len(recent_starts) < max_repeat_failures
        or any(start["id"] in ended_ids for start in recent_starts)
        or set(steps_reached) != {last_step}
    ):
        return
    verdict = newest_verdict(folder, since=recent_starts[-1]["time"])
    cause = f"the verdict on the last hang was: {verdict}" if verdict else "see the log for the cause"
    subject = f"{max_repeat_failures} starts in a row have" if max_repeat_failures > 1 else "the last start has"
    raise UserError(
        f"run.max_repeat_failures: {subject} failed in step {last_step + 1} of {folder}; {cause}; "
        "correct the cause, then start once with run.max_repeat_failures=0"
    )


def _last_recorded_step(folder: Path) -> int:
    """Return the step of the last step record. After a rollback this is not the highest step."""
    records = journal.read_records_backwards(folder / METRICS_FILE)
    return next((record["step"] for record in records if record.get("kind") == "step"), 0)


def _append_record(folder: Path, **record: Any) -> None:
    with journal.open_journal(folder / STARTS_FILE) as file:
        journal.append_record(file, record, sync=True)
