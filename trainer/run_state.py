"""What a run is made of, and how far it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.async_save import Saver
from tandem.trainer.config import RunConfig
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.ledger import Digests, Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard, Judgement
from tandem.trainer.metrics.records import Sinks, StepRecord
from tandem.trainer.metrics.throughput import throughput


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


def record_of(
    stepper: Stepper, step: int, loss: float, gradient_norm: float, step_seconds: float, data_seconds: float,
    judgement: Judgement,
) -> StepRecord:  # fmt: skip
    """The record of the step that was just finished, the `step`-th."""
    config, mesh, timeline = stepper.config, stepper.mesh, stepper.timeline
    phase = timeline.phase_at(step - 1).phase
    speed = throughput(
        phase.batch_tokens, step_seconds,
        flops_per_token=flops_per_token(config.model, phase.seq_len, causal=False),
        causal_flops_per_token=flops_per_token(config.model, phase.seq_len, causal=True),
        devices=mesh.world_size, peak_flops=stepper.peak_flops,
    )  # fmt: skip
    memory: Any = torch.cuda.max_memory_allocated() / 2**30 if mesh.device.type == "cuda" else None
    return StepRecord(
        step=step, tokens=timeline.tokens_before(step), phase=phase.name, seq_len=phase.seq_len, rows=phase.rows,
        loss=loss, lr=timeline.lr_at(step - 1), gradient_norm=gradient_norm, skipped=judgement.decision != "update",
        step_seconds=step_seconds, data_seconds=data_seconds, tokens_per_second=speed.tokens_per_second, mfu=speed.mfu,
        mfu_causal=speed.mfu_causal, memory_gib=memory, time=time.time(),
    )  # fmt: skip
