"""The run's own training step, on the rows of `tiny`: what a test says of training it says of `tandem.trainer.train`."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.config import LearningRate, RunConfig
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.guard import Guard
from tandem.trainer.run_state import Stepper
from tandem.trainer.train import one_step
from tests import tiny_configs

STEPS = 1_000
"""Of a stepper's schedule: more than any test makes."""


def steady(
    config: RunConfig,
    mesh: Mesh,
    engine: Engine,
    *,
    lr: float,
    micro_rows: int | None = None,
    watch: Callable[[str, int], object] = lambda phase, step: None,
) -> Stepper:
    """Makes the config's steps at one learning rate, of so many rows at a time where that is not the config's own number."""
    [phase] = config.schedule.phases
    phase = replace(phase, tokens=STEPS * phase.batch_tokens, micro_rows=micro_rows or phase.micro_rows)
    schedule = replace(config.schedule, phases=[phase], lr=LearningRate("linear", lr, lr, 0, None))
    return Stepper(config, mesh, Timeline(schedule), engine, 1.0, Guard(config.guard), watch=watch)


def batch(rows: tuple[Tensor, ...], mesh: Mesh) -> Batch:
    """This data-parallel rank's share of the rows, given as `tiny_configs.rows` gives them."""
    return Batch(torch.stack([tensor.chunk(mesh.dp_size)[mesh.dp_rank].int() for tensor in rows]), {})


def step(stepper: Stepper, number: int, rows: tuple[Tensor, ...] | None = None) -> tuple[float, float]:
    """Loss and gradient norm of a step that is made, by default on the rows that `tiny` has for its number."""
    rows = tiny_configs.rows(number) if rows is None else rows
    loss, gradient_norm, _, judgement = one_step(stepper, batch(rows, stepper.mesh), number)
    assert judgement.decision == "update", judgement.reason
    return loss, gradient_norm
