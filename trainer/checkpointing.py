"""The checkpoints of a run: when one is due, what it says besides tensors, how a save has ended, and going back to the last.

The one idea: all ranks begin saves at the same steps, and a save goes on while steps are made; so how one has ended is asked
for later, and what has to be the same on all ranks is agreed on with the next batch.
"""

import dataclasses
import logging

from tandem.trainer.checkpoint.async_save import RESTART_HINT, SaveResult, save_error_message
from tandem.trainer.checkpoint.read import open_newest, restore_state
from tandem.trainer.checkpoint.write import model_metadata, reject_later
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.data.ledger import BadStepAction, Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.mesh import barrier, run_on_rank_0
from tandem.trainer.run_state import Progress, RunContext, StepResult

log = logging.getLogger(__name__)
RETRY_DIVISOR = 10
"""After a save that failed the next one is tried when this part of checkpoint.every_steps has passed."""


def save_if_due(context: RunContext, progress: Progress) -> None:
    """A save is under way where one is due. After a bad step it waits for a good one: what it would save is under suspicion."""
    if context.saver.is_save_finished:
        finish_pending_save(context, progress)
    progress.is_save_due |= (
        is_due(progress.step, context.config.checkpoint.every_steps) or context.coordinator.save_requested
    )
    if progress.is_save_due and not context.guard.num_consecutive_bad_steps:
        start_save(context, progress)
    context.coordinator.save_requested_local = (
        progress.save_retry_step is not None and progress.step >= progress.save_retry_step
    )


def save_final_checkpoint(context: RunContext, progress: Progress) -> None:
    """The newest checkpoint is of this step and committed. Raises: UserError where it cannot be written."""
    context.enter_phase("save", progress.step)
    finish_pending_save(context, progress, "now: the run ends, and saves once more")
    if progress.step != progress.saved_step:
        start_save(context, progress)
        result = wait_for_pending_save(context)
        if result and result.error:
            raise UserError(save_error_message(context.folder / "checkpoints", result, RESTART_HINT))
    barrier()  # rank 0 may hold the store in which the others read how the save has ended


def start_save(context: RunContext, progress: Progress) -> None:
    """A checkpoint of this moment is under way."""
    config, engine = context.config, context.engine
    ledger = context.ledger  # rank 0's; its facts are those that are saved
    context.enter_phase("save", progress.step)
    finish_pending_save(context, progress)  # one at a time
    if not engine.num_updates:
        engine.allocate_moments(0)  # a checkpoint of nothing learned is one all the same
    metadata = {
        **model_metadata(config.model, config.mup),
        "tokens": context.timeline.tokens_before(progress.step),
        "num_updates": engine.num_updates,
        "cursor": progress.cursor,
        "num_ledger_lines": ledger.num_lines if ledger else 0,
        "guard": context.guard.state_dict(),
        "fingerprints": context.loader.fingerprints,
        "eos_token": context.loader.eos_token,
        "shuffle_settings": context.loader.shuffle_settings,
        "skipped_shards": context.loader.skipped_shards,
        "phases": [dataclasses.asdict(phase) for phase in config.schedule.phases],
    }
    context.saver.start_save(progress.step, engine, metadata, before_commit=ledger.sync if ledger else lambda: None)
    progress.saved_step, progress.is_save_due, progress.save_retry_step = progress.step, False, None


def finish_pending_save(context: RunContext, progress: Progress, consequence: str | None = None) -> None:
    """How the save that was under way, if any, has ended is on record. One that failed is tried again some steps later;
    `consequence` says what else is done.
    """
    result = wait_for_pending_save(context)
    if result and result.error:
        progress.saved_step = None
        if context.mesh.rank == 0:
            progress.save_retry_step = progress.step + max(1, context.config.checkpoint.every_steps // RETRY_DIVISOR)
            default_consequence = f"before the run saves again, by step {progress.save_retry_step} or when it ends"
            log.error(
                "%s", save_error_message(context.folder / "checkpoints", result, consequence or default_consequence)
            )


def wait_for_pending_save(context: RunContext) -> SaveResult | None:
    """How the save that was under way, if any, has ended; a checkpoint is on record."""
    if not context.saver.has_pending_save:
        return None
    context.saver.wait_until_written()
    with context.watchdog.store_wait():
        result = context.saver.wait_for_result()
    if not result.error:
        stall_seconds = context.saver.pop_stall_seconds()
        context.sinks.write_checkpoint(
            result.step, result.seconds, stall_seconds=stall_seconds, num_bytes=result.num_bytes
        )
    return result


def roll_back(context: RunContext, progress: Progress, result: StepResult) -> Progress:
    """The run stands at its last checkpoint, behind the rows that it has read since; that is on record.

    Raises: UserError where there is none, or the run has come back to it too often.
    """
    context.enter_phase("rollback", progress.step)
    config, guard, reason = context.config, context.guard, result.judgement.reason
    finish_pending_save(context, progress, "before the next save")
    checkpoint = open_newest(context.folder / "checkpoints", context.mesh)
    num_rollbacks = guard.num_rollbacks_to(checkpoint.step) if checkpoint else 0
    must_stop = checkpoint is None or num_rollbacks >= config.guard.max_rollbacks
    if context.ledger:
        action: BadStepAction = "stop" if must_stop else "rollback"
        context.ledger.write_bad_step(progress.step, result.record.loss, result.record.grad_norm, reason, action)
    bad_step_message = (
        f"step {progress.step}: {reason}, the last of {guard.num_consecutive_bad_steps} bad steps in a row"
    )
    if must_stop or checkpoint is None:
        rollback_status = (
            f"gone back to step {checkpoint.step} {num_rollbacks} times"
            if checkpoint
            else "no checkpoint to go back to"
        )
        raise UserError(
            f"{bad_step_message}; the run has {rollback_status}; look at these steps with tandem audit "
            f"{context.folder} --step {progress.step}, lower "
            "schedule.lr.peak, or raise guard.max_rollbacks"
        )
    run_on_rank_0(lambda: reject_later(checkpoint.folder), context.mesh)
    restore_state(context.engine, checkpoint, context.mesh)
    manifest = checkpoint.manifest
    guard.roll_back(checkpoint.step, manifest.get("guard"))
    if context.mesh.rank == 0:
        log.warning("%s; back to step %d, and past the rows read since", bad_step_message, checkpoint.step)
    if context.ledger:
        write_ledger_start(
            context.ledger,
            config,
            context.loader,
            context.mesh.dp_size,
            checkpoint.step,
            progress.cursor,
            num_ledger_lines=manifest["num_ledger_lines"],
            skipped_ranges=skipped_ranges(manifest["cursor"], progress.cursor),
            is_rollback=True,
        )
    context.sinks.write_rollback(checkpoint.step, progress.step, reason)
    checkpoint.close()
    return Progress(checkpoint.step, progress.cursor, checkpoint.step, validated_step=checkpoint.step)


def write_ledger_start(
    ledger: Ledger, config: TrainConfig, loader: Loader, dp_size: int, step: int, cursor: dict[str, int], *,
    num_ledger_lines: int, skipped_ranges: dict[str, tuple[int, int]], is_rollback: bool = False,
) -> None:  # fmt: skip
    """It is on record that the run goes on after `step`; see `Ledger.write_start`."""
    ledger.write_start(
        step,
        cursor,
        shuffle_settings=loader.shuffle_settings,
        phases=[dataclasses.asdict(phase) for phase in config.schedule.phases],
        fingerprints=loader.fingerprints,
        skipped_shards=loader.skipped_shards,
        dp_size=dp_size,
        num_ledger_lines=num_ledger_lines,
        skipped_ranges=skipped_ranges,
        is_rollback=is_rollback,
    )


def skipped_ranges(start_cursor: dict[str, int], end_cursor: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The places of each source between two cursors."""
    ranges = {source: (start_cursor.get(source, 0), end) for source, end in end_cursor.items()}
    return {source: (first, last) for source, (first, last) in ranges.items() if first != last}


def is_due(step: int, every_steps: int) -> bool:
    """Whether something done every so many steps is to be done after `step`; 0 is never."""
    return every_steps > 0 and step % every_steps == 0
