"""The run, from config to last checkpoint: read this first.

`run` sets everything up, resumes if it can, and `train_loop` is the list of verbs: read, compute, judge, update, record, save,
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
from tandem.trainer.batches import iterate_batches
from tandem.trainer.checkpointing import is_due, roll_back, save_final_checkpoint, save_if_due
from tandem.trainer.config import TrainConfig, UserError, check_world_size
from tandem.trainer.crash_loop import record_start
from tandem.trainer.data.damaged_shards import close_prefetch
from tandem.trainer.data.digests import StepDigests, pack_u64, unpack_u64
from tandem.trainer.data.loader import Batch, Loader, unpack_batch
from tandem.trainer.distributed.coordination import Coordinator, broadcast_stop
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import (
    Mesh,
    all_gather_objects,
    count_collectives,
    dump_flight_record,
    mesh_context,
    run_on_rank_0,
    sum_over_ranks_on_device,
    to_device,
)
from tandem.trainer.distributed.replica_check import check_replicas
from tandem.trainer.distributed.watchdog import Watchdog, current_process
from tandem.trainer.guard import Judgement
from tandem.trainer.run_folder import run_lock
from tandem.trainer.run_state import Progress, RunContext, StepContext, StepResult, build_step_record
from tandem.trainer.runtime import StopRequested, StopSignal
from tandem.trainer.startup import StartupTimer, check_held_out_tokens, start_run
from tandem.trainer.validation import validate

log = logging.getLogger(__name__)


def run(config: TrainConfig, stop_signal: StopSignal | None = None) -> int:
    """The run is as far as it was asked to go and its last checkpoint is committed.

    Returns the exit code: 0 finished, REQUEUE_EXIT_CODE saved on a signal, to be started again with the same command.
    Raises: UserError for what a person has to mend.
    """
    startup_timer = StartupTimer()
    check_world_size(config, runtime.launch_world_size())
    signal_context = nullcontext(stop_signal) if stop_signal else closing(StopSignal())
    with signal_context as stop_signal, mesh_context(config.parallel.tp_size) as mesh:
        stop_signal.mark_rendezvous_done()
        runtime.start_logging(mesh.rank)
        if config.debug.deterministic:
            runtime.make_deterministic()
        startup_timer.end_part("process group")
        folder = Path(config.run.root) / config.run.name
        processes = all_gather_objects(current_process())
        watchdog = Watchdog(
            config.watchdog, folder, processes, mesh.rank, count_collectives, flight_record=dump_flight_record
        )
        with ExitStack() as stack:
            run_on_rank_0(lambda: stack.enter_context(record_start(folder, config.run.max_repeat_failures)), mesh)
            stack.enter_context(watchdog)
            records = stack.enter_context(open_record_stack(watchdog))
            stack.enter_context(broadcast_stop(stop_signal, mesh))
            coordinator = Coordinator(mesh, stop_signal, watchdog.enter_phase)
            watchdog.enter_phase("corpora")
            with suppress(StopRequested), stop_signal.interruptible():  # a store that does not answer takes minutes
                loader = Loader(
                    config.data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size,
                    dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
                )  # fmt: skip
                check_held_out_tokens(config, loader)
            startup_timer.end_part("corpora")
            try:
                coordinator.any_rank(False)
                run_on_rank_0(lambda: stack.enter_context(run_lock(folder)), mesh)
                context, progress = start_run(
                    folder, config, mesh, loader, coordinator, watchdog, records, startup_timer
                )
                with context.saver:
                    return train_loop(context, progress)
            except StopRequested:  # before anything was done that could be lost
                return runtime.REQUEUE_EXIT_CODE


@contextmanager
def open_record_stack(watchdog: Watchdog) -> Iterator[ExitStack]:
    """What is entered in the stack is closed after the block, when the ranks have told one another how it has ended; where that
    is in order, in the time that a slow server takes.
    """
    with ExitStack() as records:
        try:
            yield records
        except UserError:
            watchdog.enter_phase("end")
            raise


def train_loop(context: RunContext, progress: Progress) -> int:
    """Steps until the schedule, its sources, `run.stop_step` or a signal end them; returns the exit code."""
    reason = None
    batches, final_step = iterate_batches(context, progress), last_step(context, progress)
    try:
        if is_due(progress.step, context.config.evaluate.every_steps) and progress.step != progress.validated_step:
            validate(context, progress)
        while progress.step < final_step:
            if progress.step == context.timeline.phase_span_at(progress.step).first_step:
                context.watchdog.use_start_timeout()
            if (result := timed_train_step(context, batches, progress.step)) is None:
                final_step = progress.step  # a shard left out just now was to feed this step
                break
            progress.step, progress.cursor = progress.step + 1, result.cursor
            log_step(context, progress, result)
            context.watchdog.finish_step(result.record.step_seconds)
            if result.judgement.decision == "rollback":
                progress = roll_back(context, progress, result)
                close_prefetch(batches, context.coordinator.stop_signal.interruptible)
                batches, final_step = iterate_batches(context, progress), last_step(context, progress)
                continue
            if is_due(progress.step, context.config.debug.compare_replicas_every_steps):
                check_replicas(context.engine.model, context.mesh, progress.step)
            save_if_due(context, progress)
            if is_due(progress.step, context.config.evaluate.every_steps) and progress.step < final_step:
                validate(context, progress)
        if progress.step:
            save_final_checkpoint(context, progress)  # first: whatever held-out rows do, the steps are not lost
        if context.config.evaluate.every_steps and progress.step != progress.validated_step:
            validate(context, progress)
        reason = end_reason(context, progress)
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)  # what is read ahead is not waited for, wherever the signal came
        save_final_checkpoint(context, progress)
    context.enter_phase("end", progress.step)
    context.sinks.write_end(
        progress.step, reason or f"stopped by {context.coordinator.stop_signal.signal_name or runtime.REMOTE_STOP_NAME}"
    )
    return 0 if reason else runtime.REQUEUE_EXIT_CODE


def last_step(context: RunContext, progress: Progress) -> int:
    """The step that the run ends with, if nothing happens to it."""
    end, _ = context.loader.find_end(progress.step, progress.cursor)
    return min(end, context.config.run.stop_step or end)


def end_reason(context: RunContext, progress: Progress) -> str:
    """Why the run ends here, of all that can end it but a signal."""
    end, source = context.loader.find_end(progress.step, progress.cursor)
    if progress.step == context.timeline.total_steps:
        return "finished"
    return (
        f"data.max_epochs.{source}"
        if source and progress.step >= end
        else f"run.stop_step {context.config.run.stop_step}"
    )


def timed_train_step(context: StepContext, batches: Iterator[Batch], step: int) -> StepResult | None:
    """Update number `step`, on the next batch; None, with nothing done, where there is no next batch."""
    start_time = time.perf_counter()
    context.enter_phase("data", step + 1)
    if (batch := next(batches, None)) is None:
        return None
    data_seconds = time.perf_counter() - start_time
    loss, grad_norm, digests, judgement = train_step(context, batch, step)
    # The device is not waited for. What is left of the update counts in what follows, as a rule the next step, whose own update
    # then counts later in turn: no second is counted twice, none is left out.
    step_seconds = time.perf_counter() - start_time
    record = build_step_record(context, step + 1, loss, grad_norm, step_seconds, data_seconds, judgement)
    return StepResult(record, batch.cursor, digests, judgement)


def train_step(context: StepContext, batch: Batch, step: int) -> tuple[float, float, StepDigests | None, Judgement]:
    """One update on one global batch, unless the guard finds it bad. Returns its mean loss in nats, the gradient norm before
    clipping, the evidence of all its rows, and what the guard said.
    """
    mesh, engine, phase = context.mesh, context.engine, context.timeline.phase_span_at(step).phase
    context.enter_phase("forward and backward", step + 1)
    local_loss = forward_backward(engine, batch, phase.micro_batch_size, mesh)
    context.enter_phase("update", step + 1)
    # Rank 0's norm goes to all in the sum, so that all decide on the same bits; and one that is not finite on any rank.
    values = torch.stack((local_loss, engine.grad_norm() * float(mesh.rank == 0)))
    if batch.digests:
        values = torch.cat(
            (values.double(), to_device(torch.tensor(pack_u64(batch.digests), dtype=torch.float64), mesh))
        )
    # The one time in a step that the host waits for the device: what is left is decided by numbers that it has.
    loss_sum, grad_norm, *digest_halves = sum_over_ranks_on_device(values)
    mean_loss = loss_sum / mesh.world_size
    judgement = context.guard.judge(phase, mean_loss, grad_norm)
    if judgement.decision == "update":
        engine.update(context.timeline.lr_at(step), grad_norm)
    else:
        engine.zero_grad()
    return mean_loss, grad_norm, unpack_u64(digest_halves, mesh.tp_size), judgement


def forward_backward(engine: Engine, batch: Batch, micro_batch_size: int, mesh: Mesh) -> Tensor:
    """The gradient of the batch's mean loss is ready for the update; returns that loss, of this rank's rows, in nats."""
    rows = to_device(batch.packed, mesh)
    starts = range(0, rows.shape[1], micro_batch_size)
    total_loss = torch.zeros((), device=mesh.device)
    for start in starts:
        loss = engine(*unpack_batch(rows[:, start : start + micro_batch_size])).mean() / len(starts)
        engine.backward(loss, is_last=start == starts[-1])
        total_loss += loss.detach()
    return total_loss


def log_step(context: RunContext, progress: Progress, result: StepResult) -> None:
    """The step, and what the guard said of it, are on record."""
    context.enter_phase("records", progress.step)
    context.sinks.write_step(result.record)
    if context.ledger and result.digests:
        context.ledger.write_step(progress.step, progress.cursor, result.digests)
    decision, reason = result.judgement.decision, result.judgement.reason
    if context.mesh.rank == 0 and decision != "update":
        log.warning("step %d: %s; its update is left out", progress.step, reason)
    if context.ledger and decision == "skip":
        context.ledger.write_bad_step(progress.step, result.record.loss, result.record.grad_norm, reason, decision)
