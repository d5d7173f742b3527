"""The objects that make up a run, its progress, and the result of one step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.config import PhaseConfig, TrainConfig
from tandem.trainer.config.flops import flops_per_token
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.digests import Digests
from tandem.trainer.data.ledger import Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard, Judgement
from tandem.trainer.metrics.records import Sinks, StepRecord
from tandem.trainer.metrics.throughput import Throughput, throughput


@dataclass(frozen=True)
class StepContext:
    """Everything a step needs. Only the engine's weights and the guard's history change."""

    config: TrainConfig
    mesh: Mesh
    timeline: Timeline
    engine: Engine
    peak_flops: float
    guard: Guard
    enter_phase: Callable[[str, int], object] = field(default=lambda phase, step: None, kw_only=True)
    """Called with the name of each phase of a step and the step's number (counted from 1) when the phase begins."""


@dataclass(frozen=True)
class RunContext(StepContext):
    """Everything else that a run needs: the source of its rows, and the destinations of its records and checkpoints."""

    folder: Path
    loader: Loader
    sinks: Sinks
    saver: CheckpointSaver
    coordinator: Coordinator
    watchdog: Watchdog
    ledger: Ledger | None
    """None on all ranks but rank 0."""


@dataclass
class Progress:
    """How far the run has progressed."""

    step: int
    cursor: dict[str, int]
    saved_step: int | None
    """Step of the newest checkpoint; None if there is none or its save failed."""
    validated_step: int | None = None
    """Step of the newest validation."""
    is_save_due: bool = False
    save_retry_step: int | None = None
    """On rank 0: the step at which to retry a failed save."""


@dataclass(frozen=True)
class StepResult:
    record: StepRecord
    cursor: dict[str, int]
    """The read position of each source after the step's rows."""
    digests: Digests | None
    """Digests of the rows that were read; None if the batch has none."""
    judgement: Judgement


def step_throughput(context: StepContext, phase: PhaseConfig, step_seconds: float) -> Throughput:
    """Return the throughput of a step of the phase."""
    model = context.config.model
    return throughput(
        phase.tokens_per_step, step_seconds,
        flops_per_token=flops_per_token(model, phase.seq_len, causal=False),
        causal_flops_per_token=flops_per_token(model, phase.seq_len, causal=True),
        num_devices=context.mesh.world_size, peak_flops=context.peak_flops,
    )  # fmt: skip


def build_step_record(
    context: StepContext, step: int, loss: float, grad_norm: float, step_seconds: float, data_seconds: float,
    judgement: Judgement,
) -> StepRecord:  # fmt: skip
    """Build the record of the step that just finished, which is number `step`, counted from 1."""
    timeline = context.timeline
    phase = timeline.phase_span_at(step - 1).phase
    peak_memory_gib = torch.cuda.max_memory_allocated() / 2**30 if context.mesh.device.type == "cuda" else None
    return StepRecord(
        step=step, tokens=timeline.tokens_before(step), phase=phase.name, seq_len=phase.seq_len,
        global_batch_size=phase.global_batch_size, loss=loss, lr=timeline.lr_at(step - 1), grad_norm=grad_norm,
        skipped=judgement.decision != "update", step_seconds=step_seconds, data_seconds=data_seconds,
        **step_throughput(context, phase, step_seconds)._asdict(), memory_gib=peak_memory_gib, time=time.time(),
    )  # fmt: skip
