"""Damaged shards left out by all ranks alike: a rank that meets one tells the others, and all read the step again.

The one idea: which shards are left out is a fact of the run, like the cursor. Ranks agree on it before a step is used, so
the rows stay the same for any number of ranks, whichever of them met the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

from tandem.trainer.data.loader import Loader
from tandem.trainer.data.rows import Batch
from tandem.trainer.data.token_stream import DamagedSourceShard
from tandem.trainer.runtime import StopRequested

T = TypeVar("T")
DamagedShardId = tuple[str, str]
"""Source and file of a damaged shard."""
GatherDamaged = Callable[[DamagedShardId | None], list[DamagedShardId]]
"""What any rank has met, the same on every rank; each calls it once for every read."""
SkipShard = Callable[[int, DamagedShardId], None]
"""Called on every rank, with the step from which on the shard is left out."""


def read_skipping_damaged(
    read: Callable[[], T], gather_damaged: GatherDamaged, skip_shard: Callable[[DamagedShardId], None] | None
) -> T | None:
    """What `read` returns once no rank meets damage in it; each shard met before has been handed to `skip_shard`, without which
    damage is an error.
    """
    while True:
        damaged, result = None, None
        try:
            result = read()
        except StopRequested:
            pass  # the exchange tells the others, and ends the reading on all of them
        except DamagedSourceShard as damage:
            if skip_shard is None:
                raise
            damaged = (damage.source, damage.file)
        all_damaged = gather_damaged(damaged)
        if not all_damaged or skip_shard is None:
            return result
        for shard_id in all_damaged:
            skip_shard(shard_id)


def close_prefetch(
    batches: Generator[Batch, None, None], wait_context: Callable[[], AbstractContextManager[None]]
) -> None:
    """They are closed, and what was being read ahead has come; where a signal comes first, that is not waited for."""
    try:
        with wait_context():
            batches.close()
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)


def batches_skipping_damaged(
    loader: Loader,
    step: int,
    cursor: dict[str, int] | None,
    gather_damaged: GatherDamaged,
    skip_shard: SkipShard | None,
    wait_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[Batch, None, None]:
    """`Loader.batches`, ended early only where what is left cannot feed a step. Batches are waited for in `wait_context`."""
    batches = loader.batches(step, cursor)

    def read() -> Batch | None:
        with wait_context():
            return next(batches, None)

    def skip_and_restart(met: DamagedShardId) -> None:
        nonlocal batches
        assert skip_shard is not None
        close_prefetch(batches, wait_context)
        skip_shard(step, met)
        batches = loader.batches(step, cursor)

    try:
        while (
            batch := read_skipping_damaged(read, gather_damaged, skip_and_restart if skip_shard else None)
        ) is not None:
            step, cursor = step + 1, batch.cursor
            yield batch
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)  # closed, it would wait for what is being read ahead
        raise
    finally:
        batches.close()
