"""The run, from config to last checkpoint: read this first.

`run` sets everything up, resumes if it can, and `loop` is the list of verbs: read, compute, judge, update, record, save,
evaluate. What varies with time comes from the Timeline as a pure function of the step, and where the data stands rides in the
batch; so all that a checkpoint adds to the config is tensors, a cursor and what the guard remembers.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer import runtime
from tandem.trainer.batches import batches_from
from tandem.trainer.checkpointing import due, gone_back, save_finally, save_if_due
from tandem.trainer.config import RunConfig, UserError, check_world
from tandem.trainer.crash_loop import attempt
from tandem.trainer.data.damaged_shards import given_up
from tandem.trainer.data.ledger import Digests, halves, joined
from tandem.trainer.data.loader import Batch, Loader, unpacked
from tandem.trainer.distributed.coordination import Agreement, spread
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import (
    Mesh,
    collectives,
    flight_record,
    gather_to_all,
    launched_world_size,
    on_rank_0,
    read_sum_over_ranks,
    started,
    to_device,
)
from tandem.trainer.distributed.replica_check import check_replicas
from tandem.trainer.distributed.watchdog import Watchdog, here
from tandem.trainer.guard import Judgement
from tandem.trainer.run_folder import held
from tandem.trainer.run_state import Made, Standing, Stepper, Training, record_of
from tandem.trainer.runtime import Stopped, StopSignal
from tandem.trainer.startup import Laps, check_held_out, start_run
from tandem.trainer.validation import validate

log = logging.getLogger(__name__)


def run(config: RunConfig, stop_signal: StopSignal | None = None) -> int:
    """The run is as far as it was asked to go and its last checkpoint is committed.

    Returns the exit code: 0 finished, REQUEUE_EXIT_CODE saved on a signal, to be started again with the same command.
    Raises: UserError for what a person has to mend.
    """
    laps = Laps()
    check_world(config, launched_world_size())
    listening = nullcontext(stop_signal) if stop_signal else closing(StopSignal())
    with listening as stop_signal, started(config.parallel.tp_size) as mesh:
        stop_signal.met()
        runtime.start_logging(mesh.rank)
        if config.debug.deterministic:
            runtime.make_deterministic()
        laps.end("process group")
        folder = Path(config.run.root) / config.run.name
        places = gather_to_all(here())
        watchdog = Watchdog(config.watchdog, folder, places, mesh.rank, collectives, flight_record=flight_record)
        with ExitStack() as stack:
            on_rank_0(lambda: stack.enter_context(attempt(folder, config.run.max_failures)), mesh)
            stack.enter_context(watchdog)
            records = stack.enter_context(closed_at_the_end(watchdog))
            stack.enter_context(spread(stop_signal, mesh))
            agreement = Agreement(mesh, stop_signal, watchdog.at)
            watchdog.at("corpora")
            with suppress(Stopped), stop_signal.interrupting():  # a store that does not answer takes minutes
                loader = Loader(
                    config.data, config.schedule, seed=config.run.seed, vocab=config.model.vocab,
                    dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
                )  # fmt: skip
                check_held_out(config, loader)
            laps.end("corpora")
            try:
                agreement.any_rank(False)
                on_rank_0(lambda: stack.enter_context(held(folder)), mesh)
                training, at = start_run(folder, config, mesh, loader, agreement, watchdog, records, laps)
                with training.saver:
                    return loop(training, at)
            except Stopped:  # before anything was done that could be lost
                return runtime.REQUEUE_EXIT_CODE


@contextmanager
def closed_at_the_end(watchdog: Watchdog) -> Iterator[ExitStack]:
    """What is entered in the stack is closed after the block, when the ranks have told one another how it has ended; where that
    is in order, in the time that a slow server takes.
    """
    with ExitStack() as records:
        try:
            yield records
        except UserError:
            watchdog.at("end")
            raise


def loop(training: Training, at: Standing) -> int:
    """Steps until the schedule, its sources, `run.stop_step` or a signal end them; returns the exit code."""
    reason = None
    batches, last = batches_from(training, at), last_step(training, at)
    try:
        if due(at.step, training.config.evaluate.every_steps) and at.step != at.evaluated_step:
            validate(training, at)
        while at.step < last:
            if at.step == training.timeline.phase_at(at.step).first_step:
                training.watchdog.patient()
            if (made := timed_step(training, batches, at.step)) is None:
                last = at.step  # a shard left out just now was to feed this step
                break
            at.step, at.cursor = at.step + 1, made.cursor
            note(training, at, made)
            training.watchdog.finished(made.record.step_seconds)
            if made.judgement.decision == "rollback":
                at = gone_back(training, at, made)
                given_up(batches, training.agreement.stop_signal.interrupting)
                batches, last = batches_from(training, at), last_step(training, at)
                continue
            if due(at.step, training.config.debug.compare_replicas_every_steps):
                check_replicas(training.engine.model, training.mesh, at.step)
            save_if_due(training, at)
            if due(at.step, training.config.evaluate.every_steps) and at.step < last:
                validate(training, at)
        if at.step:
            save_finally(training, at)  # first: whatever held-out rows do, the steps are not lost
        if training.config.evaluate.every_steps and at.step != at.evaluated_step:
            validate(training, at)
        reason = end_reason(training, at)
    except Stopped as stopped:
        with suppress(Stopped):
            batches.throw(stopped)  # what is read ahead is not waited for, wherever the signal came
        save_finally(training, at)
    training.watch("end", at.step)
    training.sinks.end(at.step, reason or f"stopped by {training.agreement.stop_signal.name or runtime.ELSEWHERE}")
    return 0 if reason else runtime.REQUEUE_EXIT_CODE


def last_step(training: Training, at: Standing) -> int:
    """The step that the run ends with, if nothing happens to it."""
    end, _ = training.loader.end(at.step, at.cursor)
    return min(end, training.config.run.stop_step or end)


def end_reason(training: Training, at: Standing) -> str:
    """Why the run ends here, of all that can end it but a signal."""
    end, source = training.loader.end(at.step, at.cursor)
    if at.step == training.timeline.total_steps:
        return "finished"
    return (
        f"data.max_epochs.{source}" if source and at.step >= end else f"run.stop_step {training.config.run.stop_step}"
    )


def timed_step(stepper: Stepper, batches: Iterator[Batch], step: int) -> Made | None:
    """Update number `step`, on the next batch; None, with nothing done, where there is no next batch."""
    began = time.perf_counter()
    stepper.watch("data", step + 1)
    if (batch := next(batches, None)) is None:
        return None
    data_seconds = time.perf_counter() - began
    loss, gradient_norm, digests, judgement = one_step(stepper, batch, step)
    # The device is not waited for. What is left of the update counts in what follows, as a rule the next step, whose own update
    # then counts later in turn: no second is counted twice, none is left out.
    seconds = time.perf_counter() - began
    record = record_of(stepper, step + 1, loss, gradient_norm, seconds, data_seconds, judgement)
    return Made(record, batch.cursor, digests, judgement)


def one_step(stepper: Stepper, batch: Batch, step: int) -> tuple[float, float, Digests | None, Judgement]:
    """One update on one global batch, unless the guard finds it bad. Returns its mean loss in nats, the gradient norm before
    clipping, the evidence of all its rows, and what the guard said.
    """
    mesh, engine, phase = stepper.mesh, stepper.engine, stepper.timeline.phase_at(step).phase
    stepper.watch("forward and backward", step + 1)
    total = accumulate(engine, batch, phase.micro_rows, mesh)
    stepper.watch("update", step + 1)
    # Rank 0's norm goes to all in the sum, so that all decide on the same bits; and one that is not finite on any rank.
    values = torch.stack((total, engine.gradient_norm() * float(mesh.rank == 0)))
    if batch.evidence:
        values = torch.cat(
            (values.double(), to_device(torch.tensor(halves(batch.evidence), dtype=torch.float64), mesh))
        )
    # The one time in a step that the host waits for the device: what is left is decided by numbers that it has.
    summed, gradient_norm, *evidence = read_sum_over_ranks(values)
    mean_loss = summed / mesh.world_size
    judgement = stepper.guard.judge(phase, mean_loss, gradient_norm)
    if judgement.decision == "update":
        engine.update(stepper.timeline.lr_at(step), gradient_norm)
    else:
        engine.drop_gradient()
    return mean_loss, gradient_norm, joined(evidence, mesh.tp_size), judgement


def accumulate(engine: Engine, batch: Batch, micro_rows: int, mesh: Mesh) -> Tensor:
    """The gradient of the batch's mean loss is ready for the update; returns that loss, of this rank's rows, in nats."""
    rows = to_device(batch.packed, mesh)
    starts = range(0, rows.shape[1], micro_rows)
    total = torch.zeros((), device=mesh.device)
    for start in starts:
        loss = engine(*unpacked(rows[:, start : start + micro_rows])).mean() / len(starts)
        engine.accumulate(loss, last=start == starts[-1])
        total += loss.detach()
    return total


def note(training: Training, at: Standing, made: Made) -> None:
    """The step, and what the guard said of it, are on record."""
    training.watch("records", at.step)
    training.sinks.step(made.record)
    if training.ledger and made.digests:
        training.ledger.step(at.step, at.cursor, made.digests)
    decision, reason = made.judgement.decision, made.judgement.reason
    if training.mesh.rank == 0 and decision != "update":
        log.warning("step %d: %s; its update is left out", at.step, reason)
    if training.ledger and decision == "skip":
        training.ledger.bad(at.step, made.record.loss, made.record.gradient_norm, reason, decision)
