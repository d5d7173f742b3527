"""Run each item of a stage as a Ray task, and wait.

datatrove's executor for Ray is not used, because its pool waits forever for a process that the system has killed, and
because it does not report failed tasks to its caller.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from tandem.data_prep.executor import ItemFunction, ProgressCallback
from tandem.trainer.config import UserError

MAX_RETRIES = 3
"""Number of times that an item is restarted after its process was killed."""
CANCEL_TIMEOUT_SECONDS = 10


def run(
    make_item_function: Callable[[], ItemFunction], items: Sequence[Any], advance: ProgressCallback,
    on_result: Callable[[Any], None] = lambda result: None, workers: int | None = None,
) -> None:  # fmt: skip
    """Like `executor.run`, on the cluster at RAY_ADDRESS or on this machine, with at most `workers` items at once."""
    if not ray.is_initialized():
        try:
            # Without an address, Ray uses the cluster that any user of this machine has named in /tmp/ray.
            address = None if os.environ.get("RAY_ADDRESS") else "local"
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except OSError as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise UserError(
                f"--executor: ray found no cluster at {where} ({' '.join(str(error).split())}); set RAY_ADDRESS to a cluster"
            ) from None
    run_item = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run_item)
    function_ref, remaining_items, pending = ray.put(make_item_function), list(reversed(items)), set[Any]()
    try:
        while remaining_items or pending:
            while remaining_items and len(pending) < (workers or len(items)):
                pending.add(run_item.remote([function_ref], remaining_items.pop()))
            finished, _ = ray.wait(list(pending))
            for item in finished:
                pending.remove(item)
                num_done, result = ray.get(item)
                advance(num_done)
                on_result(result)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, (UserError, OSError)) else error) from None
    except (OutOfMemoryError, WorkerCrashedError):
        raise UserError(
            f"--executor: a Ray task was killed {MAX_RETRIES + 1} times, probably because memory ran out; "
            "run the same command again with fewer --workers"
        ) from None
    finally:
        for item in pending:
            ray.cancel(item)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CANCEL_TIMEOUT_SECONDS)


def _run_item(function_refs: list[Any], item: Any) -> tuple[int, Any]:
    num_done = 0

    def advance(count: int) -> None:
        nonlocal num_done
        num_done += count

    result = _load_item_function(function_refs[0])(item, advance)
    return num_done, result


@lru_cache(maxsize=1)
def _load_item_function(function_ref: Any) -> ItemFunction:
    """Make the item function once per process and stage."""
    do: ItemFunction = ray.get(function_ref)()
    return do
