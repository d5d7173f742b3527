"""The batches of a run. All ranks read the same step together, and skip each shard that any of them finds damaged."""

import logging
from collections.abc import Generator
from functools import partial

from tandem.trainer.data.damaged_shards import DamagedShardId, batches_skipping_damaged
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.mesh import all_gather_values
from tandem.trainer.run_state import Progress, RunContext

log = logging.getLogger(__name__)


def iterate_batches(context: RunContext, progress: Progress) -> Generator[Batch, None, None]:
    """Yield the loader's batches from `progress` on, each as soon as every rank has its own.

    If `data.damaged_shards` is skip, all ranks skip each shard that any rank finds damaged.
    Raises: StopRequested on all ranks if one received a signal.
    """
    return batches_skipping_damaged(
        context.loader, progress.step, progress.cursor, partial(gather_damaged, context.coordinator),
        partial(skip_damaged_shard, context) if context.config.data.damaged_shards == "skip" else None,
        context.coordinator.stop_signal.interruptible,
    )  # fmt: skip


def gather_damaged(coordinator: Coordinator, shard_id: DamagedShardId | None) -> list[DamagedShardId]:
    """Return the damaged shards that any rank reports, the same list on every rank. Raises: StopRequested, like `any_rank`."""
    if not coordinator.any_rank(shard_id is not None):
        return []
    return sorted({(each[0], each[1]) for each in all_gather_values(shard_id and list(shard_id)) if each})


def skip_damaged_shard(context: RunContext, step: int, shard_id: DamagedShardId) -> None:
    """Skip this shard from update number `step` (counted from 0) on. Log and record that."""
    source, file = shard_id
    if context.mesh.rank == 0:
        log.warning("data.sources.%s: shard %s is damaged; it is skipped from step %d on", source, file, step + 1)
    if context.ledger:
        context.ledger.write_skipped_shard(step + 1, source, file)
    context.loader.skip_shard(source, file)
