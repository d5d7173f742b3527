"""What a run is made of, and how far it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.config import TrainConfig
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.digests import StepDigests
from tandem.trainer.data.ledger import Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard, Judgement
from tandem.trainer.metrics.records import Sinks, StepRecord
from tandem.trainer.metrics.throughput import throughput


@dataclass(frozen=True)
class StepContext:
    """What a step needs; nothing in it changes but the engine's weights and what the guard remembers."""

    config: TrainConfig
    mesh: Mesh
    timeline: Timeline
    engine: Engine
    peak_flops: float
    guard: Guard
    enter_phase: Callable[[str, int], object] = field(default=lambda phase, step: None, kw_only=True)
    """Told of every part of the work on a step, counted from 1, as it begins."""


@dataclass(frozen=True)
class RunContext(StepContext):
    """What a run needs besides: where its rows come from, where records and checkpoints go."""

    folder: Path
    loader: Loader
    sinks: Sinks
    saver: CheckpointSaver
    coordinator: Coordinator
    watchdog: Watchdog
    ledger: Ledger | None
    """Rank 0's."""


@dataclass
class Progress:
    """How far the run is: what a checkpoint of this moment says."""

    step: int
    cursor: dict[str, int]
    saved_step: int | None
    """The step of the newest checkpoint; None: there is none, or it could not be written."""
    validated_step: int | None = None
    """The step of the newest validation."""
    is_save_due: bool = False
    save_retry_step: int | None = None
    """On rank 0: when a save that has failed is tried again."""


@dataclass(frozen=True)
class StepResult:
    """One step."""

    record: StepRecord
    cursor: dict[str, int]
    """After its rows."""
    digests: StepDigests | None
    """Evidence of what was read, if batches carry it."""
    judgement: Judgement


def build_step_record(
    context: StepContext, step: int, loss: float, grad_norm: float, step_seconds: float, data_seconds: float,
    judgement: Judgement,
) -> StepRecord:  # fmt: skip
    """The record of the step that was just finished, the `step`-th."""
    config, mesh, timeline = context.config, context.mesh, context.timeline
    phase = timeline.phase_span_at(step - 1).phase
    step_throughput = throughput(
        phase.tokens_per_step, step_seconds,
        flops_per_token=flops_per_token(config.model, phase.seq_len, causal=False),
        causal_flops_per_token=flops_per_token(config.model, phase.seq_len, causal=True),
        num_devices=mesh.world_size, peak_flops=context.peak_flops,
    )  # fmt: skip
    peak_memory_gib: Any = torch.cuda.max_memory_allocated() / 2**30 if mesh.device.type == "cuda" else None
    return StepRecord(
        step=step,
        tokens=timeline.tokens_before(step),
        phase=phase.name,
        seq_len=phase.seq_len,
        global_batch_size=phase.global_batch_size,
        loss=loss,
        lr=timeline.lr_at(step - 1),
        grad_norm=grad_norm,
        skipped=judgement.decision != "update",
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        tokens_per_second=step_throughput.tokens_per_second,
        mfu=step_throughput.mfu,
        mfu_causal=step_throughput.mfu_causal,
        memory_gib=peak_memory_gib,
        time=time.time(),
    )
