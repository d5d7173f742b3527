"""The validation of a run: the mean loss of held-out rows, which leaves weights and gradients as they are."""

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tandem.trainer.batches import leave_out, met_by_any
from tandem.trainer.data.damaged_shards import agreed
from tandem.trainer.data.loader import Batch, unpacked
from tandem.trainer.distributed.mesh import Mesh, sum_over_ranks, to_device
from tandem.trainer.run_state import Standing, Training

log = logging.getLogger(__name__)


def validate(training: Training, at: Standing) -> None:
    """The validation loss of the weights is on record, unless damage has left no held-out row to take it of."""
    step, agreement = at.step, training.agreement
    phase = training.timeline.phase_at(step - 1).phase
    rows = partial(training.loader.validation, phase, training.config.evaluate.tokens)
    stoppable = agreement.stop_signal.until_stopped
    training.watch("data", step)
    batches: Iterable[Batch] | None = rows()
    if training.config.data.damaged_shards == "skip":
        batches = agreed(
            lambda: list(stoppable(rows())), partial(met_by_any, agreement), partial(leave_out, training, step)
        )
    left = iter(stoppable(batches or []))

    def read() -> Batch | None:
        training.watch("data", step)
        return next(left, None)

    def any_rank(has_one: bool) -> bool:
        found = agreement.any_rank(has_one)
        training.watch("evaluation", step)
        return found

    loss = validation_loss(training.engine.model, read, training.mesh, any_rank)
    at.evaluated_step = step
    if loss is not None:
        training.sinks.validation(step, training.timeline.tokens_before(step), loss)
    elif training.mesh.rank == 0:
        files = ", ".join(f"{source}/{file}" for source, files in training.loader.skipped.items() for file in files)
        log.warning("step %d: no validation loss: left out as damaged are %s, and no held-out row is left", step, files)


def validation_loss(
    model: nn.Module, read: Callable[[], Batch | None], mesh: Mesh, any_rank: Callable[[bool], bool]
) -> float | None:
    """Mean cross-entropy in nats over all ranks' rows, weights and gradients untouched; the same on every rank.

    None where no rank has a row. `read` gives this rank's next batch, `any_rank` says whether any rank has one; all ranks call
    both alike, and the latter may raise to end the validation.
    """
    total, tokens = 0.0, 0
    with torch.no_grad():
        while any_rank((batch := read()) is not None):
            if batch is None:
                continue
            losses = losses_of(model, batch, mesh)
            total += float(losses.double().sum())
            tokens += losses.numel()
    # Tensor-parallel ranks add the same numbers, which leaves the ratio as it is.
    summed, counted = sum_over_ranks([total, float(tokens)])
    return summed / counted if counted else None


def losses_of(model: nn.Module, batch: Batch, mesh: Mesh) -> Tensor:
    """Cross-entropy of every token of the batch, [rows, seq], in nats."""
    losses: Tensor = model(*unpacked(to_device(batch.packed, mesh)))
    return losses
