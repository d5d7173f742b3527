"""The run's own training step, on the rows of `tiny`: what a test says of training it says of `tandem.trainer.train`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.config import LRConfig, TrainConfig
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.guard import Guard
from tandem.trainer.run_state import StepContext
from tandem.trainer.train import train_step
from tests import tiny_configs

STEPS = 1_000
"""Of a stepper's schedule: more than any test makes."""


def steady(
    config: TrainConfig,
    mesh: Mesh,
    engine: Engine,
    *,
    lr: float,
    micro_batch_size: int | None = None,
    watch: Callable[[str, int], object] = lambda phase, step: None,
) -> StepContext:
    """Makes the config's steps at one learning rate, of so many rows at a time where that is not the config's own number."""
    [phase] = config.schedule.phases
    phase = replace(
        phase, tokens=STEPS * phase.tokens_per_step, micro_batch_size=micro_batch_size or phase.micro_batch_size
    )
    schedule = replace(config.schedule, phases=[phase], lr=LRConfig("linear", lr, lr, 0, None))
    return StepContext(config, mesh, Timeline(schedule), engine, 1.0, Guard(config.guard), enter_phase=watch)


def batch(rows: tuple[Tensor, ...], mesh: Mesh) -> Batch:
    """This data-parallel rank's share of the rows, given as `tiny_configs.rows` gives them."""
    return Batch(torch.stack([tensor.chunk(mesh.dp_size)[mesh.dp_rank].int() for tensor in rows]), {})


def step(stepper: StepContext, number: int, rows: tuple[Tensor, ...] | None = None) -> tuple[float, float]:
    """Loss and gradient norm of a step that is made, by default on the rows that `tiny` has for its number."""
    rows = tiny_configs.global_batch(number) if rows is None else rows
    loss, grad_norm, _, judgement = train_step(stepper, batch(rows, stepper.mesh), number)
    assert judgement.decision == "update", judgement.reason
    return loss, grad_norm
