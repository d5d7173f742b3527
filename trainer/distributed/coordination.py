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
from tandem.trainer.distributed.mesh import Mesh, barrier, create_shared_store, sum_over_ranks
from tandem.trainer.distributed.watchdog import is_connection_lost
from tandem.trainer.runtime import StopRequested, StopSignal

POLL_SECONDS = 1.0
"""From one look for signals to other ranks to the next."""
STOP_KEY, USER_ERROR_KEY = "told to stop", "mistake"


@dataclass
class Coordinator:
    mesh: Mesh
    stop_signal: StopSignal
    enter_phase: Callable[[str], object] = lambda phase: None
    """Told before ranks wait for one another."""
    save_requested_local: bool = False
    """Rank 0's: a save has failed, and is to be tried again now."""
    save_requested: bool = False
    """The same, agreed on by all ranks."""

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so, the same on every rank; waits for the ranks, not for what their devices are at work on.

        Raises: StopRequested on all ranks if one was told to stop.
        """
        self.enter_phase("agreement")
        stop = self.stop_signal.signal_name is not None
        num_flags, num_stops, num_save_requests = sum_over_ranks(
            [float(flag), float(stop), float(self.save_requested_local)]
        )
        if num_stops:
            raise StopRequested
        self.save_requested = num_save_requests > 0
        return num_flags > 0


@contextmanager
def broadcast_stop(stop_signal: StopSignal, mesh: Mesh) -> Iterator[None]:
    """Within the block all ranks know that one was told to stop, after twice POLL_SECONDS at most, whatever they wait for.

    Raises: UserError where another rank has left by it, instead of the error of the connection that this one then lost.
    """
    ended, store, user_errors = Event(), create_shared_store("signals"), list[str]()
    thread = Thread(
        target=_poll_store, args=(stop_signal, store, ended, user_errors), name="signals to other ranks", daemon=True
    )
    if mesh.world_size == 1:
        ended.set()
    thread.start()
    try:
        yield
    except UserError as mistake:
        with suppress(RuntimeError):
            store.set(USER_ERROR_KEY, str(mistake))
        ended.wait(2 * POLL_SECONDS if mesh.rank == 0 else 0)  # it may hold the store that the others look into
        raise
    except RuntimeError as error:
        if is_connection_lost(error):
            thread.join(2 * POLL_SECONDS)
            if user_errors:
                raise UserError(user_errors[0]) from error
        raise
    finally:
        ended.set()
        thread.join(POLL_SECONDS)
    barrier()  # rank 0 may hold the store


def _poll_store(stop_signal: StopSignal, store: Store, ended: Event, user_errors: list[str]) -> None:
    stop_known = False
    while not ended.wait(POLL_SECONDS):
        try:
            if store.check([USER_ERROR_KEY]):
                user_errors.append(store.get(USER_ERROR_KEY).decode())
                return
            if stop_known:
                continue
            if stop_signal.has_arrived:
                store.set(STOP_KEY, "")
                stop_known = True
            elif store.check([STOP_KEY]):
                stop_signal.trigger_remote_stop()
                stop_known = True
        except RuntimeError:  # the rank that holds the store is gone: the watchdog's business
            return
