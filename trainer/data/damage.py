"""Damaged shards left out by all ranks alike: a rank that meets one tells the others, and all read the step again.

The one idea: which shards are left out is a fact of the run, like the cursor. Ranks agree on it before a step is used, so
the rows stay the same for any number of ranks, whichever of them met the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from trainer.data.loader import Loader
from trainer.data.rows import Batch
from trainer.data.stream import Damaged

T = TypeVar("T")
Met = tuple[str, str]
"""Source and file of a damaged shard."""
Exchange = Callable[[Met | None], list[Met]]
"""What any rank has met, the same on every rank; each calls it once for every read."""
LeaveOut = Callable[[int, Met], None]
"""Called on every rank, with the step from which on the shard is left out."""


def agreed(read: Callable[[], T], exchange: Exchange, leave_out: Callable[[Met], None]) -> T:
    """What `read` returns once no rank meets damage in it; each shard met before has been handed to `leave_out`."""
    while True:
        met = None
        try:
            result = read()
        except Damaged as damage:
            met = (damage.source, damage.file)
        everywhere = exchange(met)
        if not everywhere:
            return result
        for each in everywhere:
            leave_out(each)


def agreed_batches(
    loader: Loader, step: int, cursor: dict[str, int] | None, exchange: Exchange, leave_out: LeaveOut
) -> Iterator[Batch]:
    """`Loader.batches`, ended early only where what is left cannot feed a step."""
    batches = loader.batches(step, cursor)

    def without(met: Met) -> None:
        nonlocal batches
        batches.close()
        leave_out(step, met)
        batches = loader.batches(step, cursor)

    try:
        while (batch := agreed(lambda: next(batches, None), exchange, without)) is not None:
            step, cursor = step + 1, batch.cursor
            yield batch
    finally:
        batches.close()
