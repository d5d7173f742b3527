"""The global batches of a run, read by all ranks alike, without the shards that any rank finds damaged."""

import logging
from collections.abc import Generator
from functools import partial

from tandem.trainer.data.damaged_shards import DamagedShardId, batches_skipping_damaged
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.mesh import all_gather_objects
from tandem.trainer.run_state import Progress, RunContext

log = logging.getLogger(__name__)


def iterate_batches(context: RunContext, progress: Progress) -> Generator[Batch, None, None]:
    """The loader's batches from here on, each of them there on all ranks; where `data.damaged_shards` says skip, without the
    shards that any rank finds damaged. Asking for one raises StopRequested on all ranks where one has been told to stop.
    """
    return batches_skipping_damaged(
        context.loader, progress.step, progress.cursor, partial(gather_damaged, context.coordinator),
        partial(skip_damaged_shard, context) if context.config.data.damaged_shards == "skip" else None,
        context.coordinator.stop_signal.interruptible,
    )  # fmt: skip


def gather_damaged(coordinator: Coordinator, shard_id: DamagedShardId | None) -> list[DamagedShardId]:
    """The damaged shards that ranks have met, the same on every rank. Raises: StopRequested as `Coordinator.any_rank`."""
    return (
        sorted({each for each in all_gather_objects(shard_id) if each})
        if coordinator.any_rank(shard_id is not None)
        else []
    )


def skip_damaged_shard(context: RunContext, step: int, shard_id: DamagedShardId) -> None:
    """From the update number `step` on no row is cut from the shard, and that is on record."""
    source, file = shard_id
    if context.mesh.rank == 0:
        log.warning("data.sources.%s: shard %s is damaged; it is left out from step %d on", source, file, step + 1)
    if context.ledger:
        context.ledger.write_skipped_shard(step + 1, source, file)
    context.loader.skip_shard(source, file)
