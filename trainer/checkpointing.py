"""When a run saves, how it finishes a save, and how it rolls back to its last checkpoint.

All ranks start a save after the same step. The write overlaps the following steps, so the result is collected later. If a save
fails, rank 0 requests a retry, and the other ranks receive the request when all ranks fetch the next batch.
"""

import dataclasses
import logging

from tandem.trainer.checkpoint.async_save import RESTART_HINT, SaveResult, save_error_message
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import open_newest, restore_state
from tandem.trainer.checkpoint.write import reject_later
from tandem.trainer.config import UserError
from tandem.trainer.data.ledger import BadStepAction
from tandem.trainer.distributed.mesh import barrier, run_on_rank_0
from tandem.trainer.run_state import Progress, RunContext, StepResult

log = logging.getLogger(__name__)
RETRY_DIVISOR = 10
"""A failed save is retried after `checkpoint.every_steps` divided by this number."""


def save_if_due(context: RunContext, progress: Progress) -> None:
    """Start a save if one is due. After a bad step, wait for the next good one, because the weights may be damaged."""
    if context.saver.pending_result and context.saver.pending_result.done():
        finish_pending_save(context, progress)
    is_scheduled = is_due(progress.step, context.config.checkpoint.every_steps)
    progress.is_save_due |= is_scheduled or context.coordinator.save_requested
    if progress.is_save_due and not context.guard.num_consecutive_bad_steps:
        start_save(context, progress)
    retry_step = progress.save_retry_step
    context.coordinator.save_requested_local = retry_step is not None and progress.step >= retry_step


def save_final_checkpoint(context: RunContext, progress: Progress) -> None:
    """Save a checkpoint of this step and wait until it is committed. Raises: UserError if it cannot be written."""
    context.enter_phase("save", progress.step)
    finish_pending_save(context, progress, "now, because the run is about to end and save once more")
    if progress.step != progress.saved_step:
        start_save(context, progress)
        result = wait_for_pending_save(context)
        if result and result.error:
            raise UserError(save_error_message(context.folder / "checkpoints", result, RESTART_HINT))
    barrier()  # rank 0 may host the store from which the other ranks read the result


def start_save(context: RunContext, progress: Progress) -> None:
    """Start a checkpoint of this step in the background."""
    config, engine, loader = context.config, context.engine, context.loader
    ledger = context.ledger  # None except on rank 0, whose metadata is saved
    context.enter_phase("save", progress.step)
    finish_pending_save(context, progress)  # only one save can run at a time
    if not engine.num_updates:
        engine.allocate_moments(0)  # a checkpoint holds AdamW's moments even before the first update
    metadata = {
        **model_metadata(config.model, config.mup),
        "tokens": context.timeline.tokens_before(progress.step),
        "num_updates": engine.num_updates,
        "cursor": progress.cursor,
        "num_ledger_lines": ledger.num_lines if ledger else 0,
        "guard": context.guard.state_dict(),
        "fingerprints": loader.fingerprints,
        "eos_token": loader.eos_token,
        "tokenizer_sha256": loader.tokenizer_sha256,
        "shuffle_settings": loader.shuffle_settings,
        "skipped_shards": loader.skipped_shards,
        "phases": [dataclasses.asdict(phase) for phase in config.schedule.phases],
    }
    context.saver.start_save(progress.step, engine, metadata, before_commit=ledger.sync if ledger else lambda: None)
    progress.saved_step, progress.is_save_due, progress.save_retry_step = progress.step, False, None


def finish_pending_save(context: RunContext, progress: Progress, consequence: str | None = None) -> None:
    """Wait for the pending save, if there is one. If it failed, log the error and schedule a retry.

    The message ends with `consequence`, by default with the step of the retry.
    """
    result = wait_for_pending_save(context)
    if result and result.error:
        progress.saved_step = None
        if context.mesh.rank == 0:
            progress.save_retry_step = progress.step + max(1, context.config.checkpoint.every_steps // RETRY_DIVISOR)
            retry = f"before the run saves again, at step {progress.save_retry_step} or at its end"
            log.error("%s", save_error_message(context.folder / "checkpoints", result, consequence or retry))


def wait_for_pending_save(context: RunContext) -> SaveResult | None:
    """Wait for the pending save, if there is one, and record the checkpoint if it was committed."""
    if not context.saver.pending_result:
        return None
    context.saver.wait_until_written()
    with context.watchdog.store_wait():
        result = context.saver.wait_for_result()
    if not result.error:
        stall_seconds = context.saver.pop_stall_seconds()
        context.sinks.write_checkpoint(result.step, result.seconds, result.num_bytes, stall_seconds=stall_seconds)
    return result


def roll_back(context: RunContext, progress: Progress, result: StepResult) -> Progress:
    """Restore the last checkpoint but keep the read position, so that the rows read since are skipped. Record the rollback.

    Raises: UserError if there is no checkpoint, or the run has rolled back to it `guard.max_rollbacks` times already.
    """
    context.enter_phase("rollback", progress.step)
    config, guard, ledger, reason = context.config, context.guard, context.ledger, result.judgement.reason
    finish_pending_save(context, progress, "before the next save")
    checkpoint = open_newest(context.folder / "checkpoints", context.mesh)
    num_rollbacks = guard.num_rollbacks_to(checkpoint.step) if checkpoint else 0
    must_stop = checkpoint is None or num_rollbacks >= config.guard.max_rollbacks
    if ledger:
        action: BadStepAction = "stop" if must_stop else "rollback"
        ledger.write_bad_step(progress.step, result.record.loss, result.record.grad_norm, reason, action)
    bad_steps = f"step {progress.step}: {reason} (bad steps in a row: {guard.num_consecutive_bad_steps})"
    if must_stop or checkpoint is None:
        obstacle = "the run has no checkpoint to roll back to"
        if checkpoint:
            obstacle = (
                f"guard.max_rollbacks allows no more rollbacks to step {checkpoint.step} (so far: {num_rollbacks})"
            )
        raise UserError(
            f"{bad_steps}; {obstacle}; inspect the rows of this step with tandem audit {context.folder} --step "
            f"{progress.step}, then lower schedule.lr.peak or raise guard.max_rollbacks"
        )
    run_on_rank_0(lambda: reject_later(checkpoint.folder), context.mesh)
    restore_state(context.engine, checkpoint, context.mesh)
    manifest = checkpoint.manifest
    guard.roll_back(checkpoint.step, manifest.get("guard"))
    if context.mesh.rank == 0:
        log.warning("%s; rolling back to step %d and skipping the rows read since", bad_steps, checkpoint.step)
    if ledger:
        ledger.write_start(
            checkpoint.step, progress.cursor, **context.loader.ledger_fields(), is_rollback=True,
            num_ledger_lines=manifest["num_ledger_lines"],
            skipped_ranges=skipped_ranges(manifest["cursor"], progress.cursor),
        )  # fmt: skip
    context.sinks.write_rollback(checkpoint.step, progress.step, reason)
    checkpoint.close()
    return Progress(checkpoint.step, progress.cursor, checkpoint.step, validated_step=checkpoint.step)


def skipped_ranges(start_cursor: dict[str, int], end_cursor: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return the range of positions of each source between two cursors."""
    ranges = {source: (start_cursor.get(source, 0), end) for source, end in end_cursor.items()}
    return {source: (first, last) for source, (first, last) in ranges.items() if first != last}


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every `every_steps` steps happens after `step`; 0 means never."""
    return every_steps > 0 and step % every_steps == 0
