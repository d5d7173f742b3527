"""Starts of a run that fail again and again at the same step come to an end, so that a queue does not start it for ever.

The one idea: each start says in `attempts.jsonl` how far the run was when it came, and a start that ends in order says that
too. What leaves no end has failed, whatever ended it; and what the next start finds is how far it got.
"""

from __future__ import annotations

import logging
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
from tandem.trainer.run_folder import LOCK_FILE

STARTS_FILE = "attempts.jsonl"
CLEAN_EXIT_CODES = (None, 0, 2)

log = logging.getLogger(__name__)


@contextmanager
def record_start(folder: Path, max_repeat_failures: int) -> Iterator[None]:
    """This start of the run is on record, and so is its end unless it fails. Entered by rank 0 alone.

    Raises: UserError where the last `max_repeat_failures` starts have failed at one step; 0 refuses none, and forgets them.
    """
    created_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"run.root: {folder} cannot be made ({reason}); name a folder you can write to") from None
    last_step = _last_recorded_step(folder)
    if max_repeat_failures:
        _check_repeat_failures(folder, last_step, max_repeat_failures)
    start_id = secrets.token_hex(4)  # another launch may try the same folder meanwhile
    try:
        _append_record(
            folder, kind="start", id=start_id, time=time.time(), reached=last_step, forgets=not max_repeat_failures
        )
    except OSError as error:
        raise UserError(
            f"{folder / STARTS_FILE}: cannot be written ({error.strerror}); make room or mend its rights"
        ) from None
    code: Any = 0
    try:
        yield
    except UserError:
        code = 2
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except SystemExit as error:
        code = error.code or 0
        if code not in CLEAN_EXIT_CODES:
            code = None
        raise
    except BaseException:
        code = None
        raise
    finally:
        if code is not None:
            _record_end(folder, start_id, code)
        if code == 2 and created_folders:
            _remove_new_folders(folder, created_folders)


def _remove_new_folders(folder: Path, created_folders: list[Path]) -> None:
    """A mistake that was found before there was a run leaves no folder of one."""
    files = list(folder.iterdir())
    if {path.name for path in files} <= {STARTS_FILE, LOCK_FILE}:
        for path in files:
            path.unlink()
        for each in created_folders:
            with suppress(OSError):  # another run may have begun below it
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
    cause = f"the last hang said: {verdict}" if verdict else "the log says why"
    subject = f"{max_repeat_failures} starts in a row have" if max_repeat_failures > 1 else "the last start has"
    raise UserError(
        f"run.max_repeat_failures: {subject} failed in step {last_step + 1} of {folder}; {cause}; "
        "mend the cause, then start once with run.max_repeat_failures=0"
    )


def _last_recorded_step(folder: Path) -> int:
    """The step of the last record of a step, which is not the highest one where the run went back."""
    for record in journal.read_records_backwards(folder / METRICS_FILE):
        if record.get("kind") == "step":
            return record["step"]
    return 0


def _append_record(folder: Path, **record: Any) -> None:
    with journal.open_journal(folder / STARTS_FILE) as file:
        journal.append_record(file, record, sync=True)
