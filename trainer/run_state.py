"""What a run is made of, and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tandem.trainer.checkpoint.save import Saver
from tandem.trainer.config import RunConfig
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.ledger import Digests, Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard, Judgement
from tandem.trainer.metrics.records import Sinks, StepRecord


@dataclass(frozen=True)
class Stepper:
    """What a step needs; nothing in it changes but the engine's weights and what the guard remembers."""

    config: RunConfig
    mesh: Mesh
    timeline: Timeline
    engine: Engine
    peak_flops: float
    guard: Guard
    watch: Callable[[str, int], object] = field(default=lambda phase, step: None, kw_only=True)
    """Told of every part of the work on a step, counted from 1, as it begins."""


@dataclass(frozen=True)
class Training(Stepper):
    """What a run needs besides: where its rows come from, where records and checkpoints go."""

    folder: Path
    loader: Loader
    sinks: Sinks
    saver: Saver
    agreement: Agreement
    watchdog: Watchdog
    ledger: Ledger | None
    """Rank 0's."""


@dataclass
class Standing:
    """How far the run is: what a checkpoint of this moment says."""

    step: int
    cursor: dict[str, int]
    saved_step: int | None
    """The step of the newest checkpoint; None: there is none, or it could not be written."""
    evaluated_step: int | None = None
    """The step of the newest validation."""
    save_due: bool = False
    retry_step: int | None = None
    """On rank 0: when a save that has failed is tried again."""


@dataclass(frozen=True)
class Made:
    """One step."""

    record: StepRecord
    cursor: dict[str, int]
    """After its rows."""
    digests: Digests | None
    """Evidence of what was read, if batches carry it."""
    judgement: Judgement
