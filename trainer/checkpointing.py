"""The checkpoints of a run: when one is due, what it says besides tensors, how a save has ended, and going back to the last.

The one idea: all ranks begin saves at the same steps, and a save goes on while steps are made; so how one has ended is asked
for later, and what has to be the same on all ranks is agreed on with the next batch.
"""

import dataclasses
import logging

from tandem.trainer.checkpoint.async_save import START_AGAIN, Outcome, not_saved
from tandem.trainer.checkpoint.read import newest, restore
from tandem.trainer.checkpoint.write import model_facts, pass_over_later
from tandem.trainer.config import RunConfig, UserError
from tandem.trainer.data.ledger import Decision, Ledger
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.mesh import barrier, on_rank_0
from tandem.trainer.run_state import Made, Standing, Training

log = logging.getLogger(__name__)
RETRY_SHARE = 10
"""After a save that failed the next one is tried when this part of checkpoint.every_steps has passed."""


def save_if_due(training: Training, at: Standing) -> None:
    """A save is under way where one is due. After a bad step it waits for a good one: what it would save is under suspicion."""
    if training.saver.ended:
        settle_save(training, at)
    at.save_due |= due(at.step, training.config.checkpoint.every_steps) or training.agreement.save_wanted
    if at.save_due and not training.guard.skips:
        begin_save(training, at)
    training.agreement.wants_save = at.retry_step is not None and at.step >= at.retry_step


def save_finally(training: Training, at: Standing) -> None:
    """The newest checkpoint is of this step and committed. Raises: UserError where it cannot be written."""
    training.watch("save", at.step)
    settle_save(training, at, "now: the run ends, and saves once more")
    if at.step != at.saved_step:
        begin_save(training, at)
        outcome = settled(training)
        if outcome and outcome.error:
            raise UserError(not_saved(training.folder / "checkpoints", outcome, START_AGAIN))
    barrier()  # rank 0 may hold the store in which the others read how the save has ended


def begin_save(training: Training, at: Standing) -> None:
    """A checkpoint of this moment is under way."""
    config, engine = training.config, training.engine
    ledger = training.ledger  # rank 0's; its facts are those that are saved
    training.watch("save", at.step)
    settle_save(training, at)  # one at a time
    if not engine.num_updates:
        engine.allocate_moments(0)  # a checkpoint of nothing learned is one all the same
    facts = {
        **model_facts(config.model, config.mup),
        "tokens": training.timeline.tokens_before(at.step),
        "updates": engine.num_updates,
        "cursor": at.cursor,
        "ledger_lines": ledger.num_lines if ledger else 0,
        "guard": training.guard.state(),
        "fingerprints": training.loader.fingerprints,
        "eos_token": training.loader.eos_token,
        "order": training.loader.order,
        "skipped": training.loader.skipped,
        "phases": [dataclasses.asdict(phase) for phase in config.schedule.phases],
    }
    training.saver.begin(at.step, engine, facts, before_commit=ledger.sync if ledger else lambda: None)
    at.saved_step, at.save_due, at.retry_step = at.step, False, None


def settle_save(training: Training, at: Standing, then: str | None = None) -> None:
    """How the save that was under way, if any, has ended is on record. One that failed is tried again some steps later; `then`
    says what else is done.
    """
    outcome = settled(training)
    if outcome and outcome.error:
        at.saved_step = None
        if training.mesh.rank == 0:
            at.retry_step = at.step + max(1, training.config.checkpoint.every_steps // RETRY_SHARE)
            next_save = f"before the run saves again, by step {at.retry_step} or when it ends"
            log.error("%s", not_saved(training.folder / "checkpoints", outcome, then or next_save))


def settled(training: Training) -> Outcome | None:
    """How the save that was under way, if any, has ended; a checkpoint is on record."""
    if not training.saver.running:
        return None
    training.saver.wait_until_written()
    with training.watchdog.in_store():
        outcome = training.saver.outcome()
    if not outcome.error:
        stall_seconds = training.saver.take_stall_seconds()
        training.sinks.checkpoint(
            outcome.step, outcome.seconds, stall_seconds=stall_seconds, num_bytes=outcome.num_bytes
        )
    return outcome


def gone_back(training: Training, at: Standing, made: Made) -> Standing:
    """The run stands at its last checkpoint, behind the rows that it has read since; that is on record.

    Raises: UserError where there is none, or the run has come back to it too often.
    """
    training.watch("rollback", at.step)
    config, guard, reason = training.config, training.guard, made.judgement.reason
    settle_save(training, at, "before the next save")
    snapshot = newest(training.folder / "checkpoints", training.mesh)
    times = guard.rollbacks_to(snapshot.step) if snapshot else 0
    stops = snapshot is None or times >= config.guard.max_rollbacks
    if training.ledger:
        decision: Decision = "stop" if stops else "rollback"
        training.ledger.bad(at.step, made.record.loss, made.record.gradient_norm, reason, decision)
    bad = f"step {at.step}: {reason}, the last of {guard.skips} bad steps in a row"
    if stops or snapshot is None:
        where = f"gone back to step {snapshot.step} {times} times" if snapshot else "no checkpoint to go back to"
        raise UserError(
            f"{bad}; the run has {where}; look at these steps with tandem audit {training.folder} --step {at.step}, lower "
            "schedule.lr.peak, or raise guard.max_rollbacks"
        )
    on_rank_0(lambda: pass_over_later(snapshot.folder), training.mesh)
    restore(training.engine, snapshot, training.mesh)
    facts = snapshot.manifest
    guard.go_back(snapshot.step, facts.get("guard"))
    if training.mesh.rank == 0:
        log.warning("%s; back to step %d, and past the rows read since", bad, snapshot.step)
    if training.ledger:
        begin_in_ledger(
            training.ledger, config, training.loader, training.mesh.dp_size, snapshot.step, at.cursor,
            after=facts["ledger_lines"], passed=passed_over(facts["cursor"], at.cursor), rollback=True,
        )  # fmt: skip
    training.sinks.rollback(snapshot.step, at.step, reason)
    snapshot.close()
    return Standing(snapshot.step, at.cursor, snapshot.step, evaluated_step=snapshot.step)


def begin_in_ledger(
    ledger: Ledger, config: RunConfig, loader: Loader, dp_size: int, step: int, cursor: dict[str, int], *,
    after: int, passed: dict[str, tuple[int, int]], rollback: bool = False,
) -> None:  # fmt: skip
    """It is on record that the run goes on after `step`; see `Ledger.start`."""
    ledger.start(
        step, cursor, order=loader.order, phases=[dataclasses.asdict(phase) for phase in config.schedule.phases],
        fingerprints=loader.fingerprints, skipped=loader.skipped, dp_size=dp_size, after=after, passed=passed,
        rollback=rollback,
    )  # fmt: skip


def passed_over(before: dict[str, int], after: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The places of each source between two cursors."""
    ends = {source: (before.get(source, 0), end) for source, end in after.items()}
    return {source: (first, last) for source, (first, last) in ends.items() if first != last}


def due(step: int, every_steps: int) -> bool:
    """Whether something done every so many steps is to be done after `step`; 0 is never."""
    return every_steps > 0 and step % every_steps == 0
