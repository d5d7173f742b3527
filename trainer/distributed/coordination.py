"""Decisions that all ranks make together: whether to stop, whether any rank found a damaged shard, and whether to retry a save.

The ranks agree before each step and before each validation batch, so all of them stop at the same step. A rank also announces
two events in the shared key-value store, because other ranks may never reach the next agreement:

* It received a stop signal. Another rank may be waiting for remote data that does not arrive.
* It is exiting with a UserError. The others must not treat it as lost and restart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread

from torch.distributed import Store

from tandem.trainer.config import UserError
from tandem.trainer.distributed.mesh import Mesh, barrier, create_shared_store, sum_over_ranks
from tandem.trainer.distributed.watchdog import is_connection_lost
from tandem.trainer.runtime.signals import StopRequested, StopSignal

POLL_SECONDS = 1.0
"""Interval at which a rank polls the store."""
STOP_KEY, USER_ERROR_KEY = "stop", "user error"


@dataclass
class Coordinator:
    mesh: Mesh
    stop_signal: StopSignal
    enter_phase: Callable[[str], object] = lambda phase: None
    """Called before the ranks wait for one another."""
    save_requested_local: bool = False
    """Set on rank 0 if a save has failed and must be retried now."""
    save_requested: bool = False
    """The same flag on all ranks, set by `any_rank`."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, with the same result on every rank. Does not wait for the devices.

        Raises: StopRequested on all ranks if one received a stop signal.
        """
        self.enter_phase("agreement")
        flags = (flag, self.stop_signal.signal_name is not None, self.save_requested_local)
        num_flags, num_stops, num_save_requests = sum_over_ranks([float(each) for each in flags])
        if num_stops:
            raise StopRequested
        self.save_requested = num_save_requests > 0
        return num_flags > 0


@contextmanager
def broadcast_stop(stop_signal: StopSignal, mesh: Mesh) -> Iterator[None]:
    """Inside the block, forward one rank's stop signal to all within 2 * POLL_SECONDS, even if they are waiting.

    Raises: UserError if this rank lost the connection because another rank exited with that UserError.
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
        ended.wait(2 * POLL_SECONDS if mesh.rank == 0 else 0)  # rank 0 may host the store that the others poll
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
    barrier()  # rank 0 may host the store


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
        except RuntimeError:  # the rank that hosts the store is gone; the watchdog handles that
            return
