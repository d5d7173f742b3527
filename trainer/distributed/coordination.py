"""What all ranks decide together between two pieces of work: whether to stop, and which damaged shards are left out.

The one idea: a rank that was told to stop, or that has met damage, says so where all ranks meet anyway, before a step and
before each batch of a validation; so all of them leave at the same step. That it was told to stop it also says behind their
backs, because the others may be waiting for a store that does not answer, and come to no meeting. So does a rank that leaves by
a mistake of the user which it alone has met: the others are not to take it for lost, and start again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread

from torch.distributed import Store

from tandem.trainer.config import UserError
from tandem.trainer.distributed.mesh import Mesh, barrier, shared_store, sum_over_ranks
from tandem.trainer.distributed.watchdog import connection_lost
from tandem.trainer.runtime import Stopped, StopSignal

SPREAD_SECONDS = 1.0
"""From one look for signals to other ranks to the next."""
TOLD, MISTAKE = "told to stop", "mistake"


@dataclass
class Agreement:
    mesh: Mesh
    stop_signal: StopSignal
    watch: Callable[[str], object] = lambda phase: None
    """Told before ranks wait for one another."""
    wants_save: bool = False
    """Rank 0's: a save has failed, and is to be tried again now."""
    save_wanted: bool = False
    """The same, agreed on by all ranks."""

    def any_rank(self, said: bool) -> bool:
        """Whether any rank says so, the same on every rank; waits for the ranks, not for what their devices are at work on.

        Raises: Stopped on all ranks if one was told to stop.
        """
        self.watch("agreement")
        stop = self.stop_signal.name is not None
        said_by, stops, saves = sum_over_ranks([float(said), float(stop), float(self.wants_save)])
        if stops:
            raise Stopped
        self.save_wanted = saves > 0
        return said_by > 0


@contextmanager
def spread(stop_signal: StopSignal, mesh: Mesh) -> Iterator[None]:
    """Within the block all ranks know that one was told to stop, after twice SPREAD_SECONDS at most, whatever they wait for.

    Raises: UserError where another rank has left by it, instead of the error of the connection that this one then lost.
    """
    ended, store, mistakes = Event(), shared_store("signals"), list[str]()
    thread = Thread(
        target=_spread, args=(stop_signal, store, ended, mistakes), name="signals to other ranks", daemon=True
    )
    if mesh.world_size == 1:
        ended.set()
    thread.start()
    try:
        yield
    except UserError as mistake:
        with suppress(RuntimeError):
            store.set(MISTAKE, str(mistake))
        ended.wait(2 * SPREAD_SECONDS if mesh.rank == 0 else 0)  # it may hold the store that the others look into
        raise
    except RuntimeError as error:
        if connection_lost(error):
            thread.join(2 * SPREAD_SECONDS)
            if mistakes:
                raise UserError(mistakes[0]) from error
        raise
    finally:
        ended.set()
        thread.join(SPREAD_SECONDS)
    barrier()  # rank 0 may hold the store


def _spread(stop_signal: StopSignal, store: Store, ended: Event, mistakes: list[str]) -> None:
    told = False
    while not ended.wait(SPREAD_SECONDS):
        try:
            if store.check([MISTAKE]):
                mistakes.append(store.get(MISTAKE).decode())
                return
            if told:
                continue
            if stop_signal.came:
                store.set(TOLD, "")
                told = True
            elif store.check([TOLD]):
                stop_signal.told_elsewhere()
                told = True
        except RuntimeError:  # the rank that holds the store is gone: the watchdog's business
            return
