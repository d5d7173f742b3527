"""What all ranks decide together between two pieces of work: whether to stop, and which damaged shards are left out.

The one idea: a rank that was told to stop, or that has met damage, says so where all ranks meet anyway, before a step and
before each batch of a validation; so all of them leave at the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.data.damage import Met
from trainer.parallel.mesh import Mesh, gather_to_all, sum_over_ranks
from trainer.runtime import Stopped, StopSignal


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
        """Whether any rank says so, the same on every rank. Raises: Stopped on all ranks if one was told to stop."""
        self.watch("agreement")
        stop = self.stop_signal.name is not None
        said_by, stops, saves = sum_over_ranks([float(said), float(stop), float(self.wants_save)], self.mesh)
        if stops:
            raise Stopped
        self.save_wanted = saves > 0
        return said_by > 0

    def met_by_any(self, met: Met | None) -> list[Met]:
        """The damaged shards that ranks have met, the same on every rank. Raises: Stopped as `any_rank`."""
        return sorted({each for each in gather_to_all(met) if each}) if self.any_rank(met is not None) else []
