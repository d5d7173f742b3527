"""Tasks of Ray, one for each item of a stage; this process hands them out and waits.

Not datatrove's executor for Ray: it starts its tasks in a pool that waits for ever for a process that the system has
killed, and says nothing to its caller of tasks that failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from tandem.data_prep.executor import Advance, Do
from tandem.trainer.config import UserError

RETRIES = 3
"""Of an item whose process was killed."""
CANCEL_SECONDS = 10


def run(
    start: Callable[[], Do],
    items: Sequence[Any],
    advance: Advance,
    take: Callable[[Any], None] | None = None,
    workers: int | None = None,
) -> None:
    """As `executor.run`, on the cluster that RAY_ADDRESS names, or on this machine; no more than `workers` items
    at once.
    """
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        except OSError as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise UserError(
                f"--executor: ray; none at {where} ({' '.join(str(error).split())}); see RAY_ADDRESS"
            ) from None
    one = ray.remote(num_cpus=1, max_retries=RETRIES)(_item)
    given, left, waiting = ray.put(start), list(reversed(items)), set[Any]()
    try:
        while left or waiting:
            while left and len(waiting) < (workers or len(items)):
                waiting.add(one.remote([given], left.pop()))
            finished, _ = ray.wait(list(waiting))
            for item in finished:
                waiting.remove(item)
                told, result = ray.get(item)
                advance(told)
                if take:
                    take(result)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, (UserError, OSError)) else error) from None
    except (OutOfMemoryError, WorkerCrashedError):
        raise UserError(
            f"--executor: ray; a task was killed {RETRIES + 1} times, most likely for memory; "
            "run the same command again, with fewer --workers"
        ) from None
    finally:
        for item in waiting:
            ray.cancel(item)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=CANCEL_SECONDS)


def _item(given: list[Any], item: Any) -> tuple[int, Any]:
    told = 0

    def advance(count: int) -> None:
        nonlocal told
        told += count

    result = _started(given[0])(item, advance)
    return told, result


@lru_cache(maxsize=1)
def _started(given: Any) -> Do:
    """Once in each process and stage."""
    do: Do = ray.get(given)()
    return do
