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
from tandem.trainer.metrics.records import FILE as METRICS_FILE
from tandem.trainer.run_folder import HELD

FILE = "attempts.jsonl"
ORDERLY_EXIT_CODES = (None, 0, 2)

log = logging.getLogger(__name__)


@contextmanager
def attempt(folder: Path, max_failures: int) -> Iterator[None]:
    """This start of the run is on record, and so is its end unless it fails. Entered by rank 0 alone.

    Raises: UserError where the last `max_failures` starts have failed at one step; 0 refuses none, and forgets them.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"run.root: {folder} cannot be made ({reason}); name a folder you can write to") from None
    reached = _reached(folder)
    if max_failures:
        _check(folder, reached, max_failures)
    start = secrets.token_hex(4)  # another launch may try the same folder meanwhile
    try:
        _append(folder, kind="start", id=start, time=time.time(), reached=reached, forgets=not max_failures)
    except OSError as error:
        raise UserError(
            f"{folder / FILE}: cannot be written ({error.strerror}); make room or mend its rights"
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
        if code not in ORDERLY_EXIT_CODES:
            code = None
        raise
    except BaseException:
        code = None
        raise
    finally:
        if code is not None:
            _end(folder, start, code)
        if code == 2 and made:
            _leave_nothing(folder, made)


def _leave_nothing(folder: Path, made: list[Path]) -> None:
    """A mistake that was found before there was a run leaves no folder of one."""
    left = list(folder.iterdir())
    if {path.name for path in left} <= {FILE, HELD}:
        for path in left:
            path.unlink()
        for each in made:
            with suppress(OSError):  # another run may have begun below it
                each.rmdir()


def _end(folder: Path, start: str, code: int) -> None:
    try:
        _append(folder, kind="end", id=start, time=time.time(), code=code)
    except OSError as error:
        log.warning("%s: cannot be written (%s); this start will count as failed", folder / FILE, error.strerror)


def _check(folder: Path, reached: int, max_failures: int) -> None:
    starts: list[dict[str, Any]] = []
    ended = set()
    for record in journal.records(folder / FILE):
        if record["kind"] == "end":
            ended.add(record["id"])
        else:
            starts = [record] if record["forgets"] else [*starts, record]
    last = starts[-max_failures:]
    left = [start["reached"] for start in last[1:]] + [reached]
    if len(last) < max_failures or any(start["id"] in ended for start in last) or set(left) != {reached}:
        return
    words = newest_verdict(folder, since=last[-1]["time"])
    said = f"the last hang said: {words}" if words else "the log says why"
    failed = f"{max_failures} starts in a row have" if max_failures > 1 else "the last start has"
    raise UserError(
        f"run.max_failures: {failed} failed in step {reached + 1} of {folder}; {said}; "
        "mend the cause, then start once with run.max_failures=0"
    )


def _reached(folder: Path) -> int:
    """The step of the last record of a step, which is not the highest one where the run went back."""
    for record in journal.records_from_the_end(folder / METRICS_FILE):
        if record.get("kind") == "step":
            return record["step"]
    return 0


def _append(folder: Path, **record: Any) -> None:
    with journal.opened(folder / FILE) as file:
        journal.append(file, record, sync=True)
