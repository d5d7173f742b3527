"""The validation loss: the mean over held-out rows. Validation changes neither weights nor gradients."""

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tandem.trainer.batches import gather_damaged, skip_damaged_shard
from tandem.trainer.data.damaged_shards import read_skipping_damaged
from tandem.trainer.data.loader import Batch, unpack_batch
from tandem.trainer.distributed.mesh import Mesh, sum_over_ranks, to_device
from tandem.trainer.run_state import Progress, RunContext

log = logging.getLogger(__name__)


def validate(context: RunContext, progress: Progress) -> None:
    """Record the validation loss of the weights, or log that damage has left no held-out row to compute it on."""
    step, coordinator, loader = progress.step, context.coordinator, context.loader
    phase = context.timeline.phase_span_at(step - 1).phase
    validation_batches = partial(loader.validation_batches, phase, context.config.evaluate.tokens)
    until_stop = coordinator.stop_signal.iterate_until_stop
    context.enter_phase("data", step)
    batches: Iterable[Batch] | None = validation_batches()
    if context.config.data.damaged_shards == "skip":
        batches = read_skipping_damaged(
            lambda: list(until_stop(validation_batches())),
            partial(gather_damaged, coordinator),
            partial(skip_damaged_shard, context, step),
        )
    batch_iterator = iter(until_stop(batches or []))

    def next_batch() -> Batch | None:
        context.enter_phase("data", step)
        return next(batch_iterator, None)

    def any_rank(has_one: bool) -> bool:
        found = coordinator.any_rank(has_one)
        context.enter_phase("evaluation", step)
        return found

    loss = validation_loss(context.engine.model, next_batch, context.mesh, any_rank)
    progress.validated_step = step
    if loss is not None:
        context.sinks.write_validation(step, context.timeline.tokens_before(step), loss)
    elif context.mesh.rank == 0:
        shards = ", ".join(f"{source}/{file}" for source, files in loader.skipped_shards.items() for file in files)
        message = "step %d: no validation, because all held-out rows are in damaged shards (skipped: %s)"
        log.warning(message, step, shards)


def validation_loss(
    model: nn.Module, next_batch: Callable[[], Batch | None], mesh: Mesh, any_rank: Callable[[bool], bool]
) -> float | None:
    """Return the mean cross-entropy in nats over the rows of all ranks, or None if no rank has a row.

    `next_batch` returns this rank's next batch. `any_rank` returns whether any rank has a batch, and may raise to end the
    validation. All ranks call both the same number of times.
    """
    total_loss, num_tokens = 0.0, 0
    with torch.no_grad():
        while any_rank((batch := next_batch()) is not None):
            if batch is None:
                continue
            losses = token_losses(model, batch, mesh)
            total_loss += float(losses.double().sum())
            num_tokens += losses.numel()
    # Tensor-parallel ranks all add the same numbers, so the common factor cancels in the ratio.
    loss_sum, token_sum = sum_over_ranks([total_loss, float(num_tokens)])
    return loss_sum / token_sum if token_sum else None


def token_losses(model: nn.Module, batch: Batch, mesh: Mesh) -> Tensor:
    """Return the cross-entropy of every token of the batch, [rows, seq], in nats."""
    losses: Tensor = model(*unpack_batch(to_device(batch.packed, mesh)))
    return losses
