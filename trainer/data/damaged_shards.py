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
from tandem.trainer.data.token_stream import Damaged
from tandem.trainer.runtime import Stopped

T = TypeVar("T")
Met = tuple[str, str]
"""Source and file of a damaged shard."""
Exchange = Callable[[Met | None], list[Met]]
"""What any rank has met, the same on every rank; each calls it once for every read."""
LeaveOut = Callable[[int, Met], None]
"""Called on every rank, with the step from which on the shard is left out."""


def agreed(read: Callable[[], T], exchange: Exchange, leave_out: Callable[[Met], None] | None) -> T | None:
    """What `read` returns once no rank meets damage in it; each shard met before has been handed to `leave_out`, without which
    damage is an error.
    """
    while True:
        met, result = None, None
        try:
            result = read()
        except Stopped:
            pass  # the exchange tells the others, and ends the reading on all of them
        except Damaged as damage:
            if leave_out is None:
                raise
            met = (damage.source, damage.file)
        everywhere = exchange(met)
        if not everywhere or leave_out is None:
            return result
        for each in everywhere:
            leave_out(each)


def given_up(batches: Generator[Batch, None, None], reading: Callable[[], AbstractContextManager[None]]) -> None:
    """They are closed, and what was being read ahead has come; where a signal comes first, that is not waited for."""
    try:
        with reading():
            batches.close()
    except Stopped as stopped:
        with suppress(Stopped):
            batches.throw(stopped)


def agreed_batches(
    loader: Loader,
    step: int,
    cursor: dict[str, int] | None,
    exchange: Exchange,
    leave_out: LeaveOut | None,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[Batch, None, None]:
    """`Loader.batches`, ended early only where what is left cannot feed a step. Each batch is waited for within `reading`."""
    batches = loader.batches(step, cursor)

    def read() -> Batch | None:
        with reading():
            return next(batches, None)

    def without(met: Met) -> None:
        nonlocal batches
        assert leave_out is not None
        given_up(batches, reading)
        leave_out(step, met)
        batches = loader.batches(step, cursor)

    try:
        while (batch := agreed(read, exchange, without if leave_out else None)) is not None:
            step, cursor = step + 1, batch.cursor
            yield batch
    except Stopped as stopped:
        with suppress(Stopped):
            batches.throw(stopped)  # closed, it would wait for what is being read ahead
        raise
    finally:
        batches.close()
