"""Skips damaged shards on all ranks: if one rank finds damage, all ranks skip that shard and read the step again.

The skipped shards belong to the state of the run, like the cursor. Ranks agree on them before a step uses its rows, so the rows
do not depend on the number of ranks or on which rank found the damage.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

from tandem.trainer.data.loader import Loader
from tandem.trainer.data.rows import Batch
from tandem.trainer.data.token_stream import DamagedSourceShard
from tandem.trainer.runtime.signals import StopRequested

T = TypeVar("T")
DamagedShardId = tuple[str, str]
"""Source and file of a damaged shard."""
GatherDamaged = Callable[[DamagedShardId | None], list[DamagedShardId]]
"""Collective: takes the damage that this rank found, and returns what all ranks found. Called once per read."""
SkipShard = Callable[[int, DamagedShardId], None]
"""Called on every rank with a shard and the first step that skips it."""


def read_skipping_damaged(
    read: Callable[[], T], gather_damaged: GatherDamaged, skip_shard: Callable[[DamagedShardId], None] | None
) -> T | None:
    """Call `read` until no rank finds damage, and return its result. Between calls, pass each damaged shard to `skip_shard`.

    Raises: DamagedSourceShard if a shard is damaged and `skip_shard` is None.
    """
    while True:
        damaged, result = None, None
        try:
            result = read()
        except StopRequested:
            pass  # the exchange below raises it on all ranks
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
    """Close the batches. Wait for reads in progress, unless a signal arrives first."""
    try:
        with wait_context():
            batches.close()
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)


def batches_skipping_damaged(
    loader: Loader, step: int, cursor: dict[str, int] | None, gather_damaged: GatherDamaged, skip_shard: SkipShard | None,
    wait_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Yield `Loader.batches` without damaged shards. End early if the remaining shards have too few tokens for a step.

    Each wait for a batch happens inside a `wait_context`.
    """
    batches = loader.batches(step, cursor)

    def read() -> Batch | None:
        with wait_context():
            return next(batches, None)

    def skip_and_restart(shard_id: DamagedShardId) -> None:
        nonlocal batches
        assert skip_shard is not None
        close_prefetch(batches, wait_context)
        skip_shard(step, shard_id)
        batches = loader.batches(step, cursor)

    try:
        on_damage = skip_and_restart if skip_shard else None
        while (batch := read_skipping_damaged(read, gather_damaged, on_damage)) is not None:
            step, cursor = step + 1, batch.cursor
            yield batch
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)  # `close` would wait for the prefetch
        raise
    finally:
        batches.close()
