"""The global batches of a run, read by all ranks alike, without the shards that any rank finds damaged."""

import logging
from collections.abc import Generator
from functools import partial

from tandem.trainer.data.damaged_shards import Met, agreed_batches
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.mesh import gather_to_all
from tandem.trainer.run_state import Standing, Training

log = logging.getLogger(__name__)


def batches_from(training: Training, at: Standing) -> Generator[Batch, None, None]:
    """The loader's batches from here on, each of them there on all ranks; where `data.damaged_shards` says skip, without the
    shards that any rank finds damaged. Asking for one raises Stopped on all ranks where one has been told to stop.
    """
    return agreed_batches(
        training.loader, at.step, at.cursor, partial(met_by_any, training.agreement),
        partial(leave_out, training) if training.config.data.damaged_shards == "skip" else None,
        training.agreement.stop_signal.interrupting,
    )  # fmt: skip


def met_by_any(agreement: Agreement, met: Met | None) -> list[Met]:
    """The damaged shards that ranks have met, the same on every rank. Raises: Stopped as `Agreement.any_rank`."""
    return sorted({each for each in gather_to_all(met) if each}) if agreement.any_rank(met is not None) else []


def leave_out(training: Training, step: int, met: Met) -> None:
    """From the update number `step` on no row is cut from the shard, and that is on record."""
    source, file = met
    if training.mesh.rank == 0:
        log.warning("data.sources.%s: shard %s is damaged; it is left out from step %d on", source, file, step + 1)
    if training.ledger:
        training.ledger.skip(step + 1, source, file)
    training.loader.skip(source, file)
