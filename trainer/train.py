"""A training run from its config to its last checkpoint. Start reading here.

`run` sets everything up. `train_loop` runs the steps: read a batch, compute, judge, update, record, save, validate.
The learning rate, the batch size and the data mixture are pure functions of the step (`Timeline`), and each batch carries the
read position that follows it (its `cursor`). A checkpoint therefore holds only tensors, a cursor and the guard's state.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from tandem.trainer.batches import iterate_batches
from tandem.trainer.checkpointing import is_due, roll_back, save_final_checkpoint, save_if_due
from tandem.trainer.config import TrainConfig, check_world_size
from tandem.trainer.crash_loop import record_start
from tandem.trainer.data.damaged_shards import close_prefetch
from tandem.trainer.data.digests import Digests, pack_u64, unpack_u64
from tandem.trainer.data.loader import Batch, unpack_batch
from tandem.trainer.distributed.coordination import Coordinator, broadcast_stop
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import (
    Mesh,
    count_collectives,
    dump_flight_record,
    mesh_context,
    run_on_rank_0,
    sum_over_ranks_on_device,
    to_device,
)
from tandem.trainer.distributed.replica_check import check_replicas
from tandem.trainer.distributed.watchdog import Watchdog, gather_processes
from tandem.trainer.guard import Judgement
from tandem.trainer.run_folder import run_lock
from tandem.trainer.run_state import Progress, RunContext, StepContext, StepResult, build_step_record
from tandem.trainer.runtime import launch, process, signals
from tandem.trainer.runtime.signals import StopRequested, StopSignal
from tandem.trainer.startup import StartupTimer, open_loader, open_record_stack, start_run
from tandem.trainer.validation import validate

log = logging.getLogger(__name__)


def run(config: TrainConfig, stop_signal: StopSignal | None = None) -> int:
    """Train from the newest checkpoint, or from step 0, and commit a final checkpoint.

    Returns the exit code: 0 if the run is complete, or REQUEUE_EXIT_CODE if a signal stopped it. After a signal, the same
    command continues the run.
    Raises: UserError for a mistake that the user must correct.
    """
    startup_timer = StartupTimer()
    check_world_size(config, launch.current_launch().world_size)
    signal_context = nullcontext(stop_signal) if stop_signal else closing(StopSignal())
    with signal_context as stop_signal, mesh_context(config.parallel.tp_size) as mesh:
        stop_signal.mark_rendezvous_done()
        process.start_logging(mesh.rank)
        if config.debug.deterministic:
            process.make_deterministic()
        startup_timer.end_part("process group")
        folder = Path(config.run.root) / config.run.name
        processes = gather_processes()
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
            # If a corpus is on an unreachable server, opening it blocks for minutes, so a signal may interrupt it.
            # `coordinator.any_rank` below then stops all ranks together.
            with suppress(StopRequested), stop_signal.interruptible():
                loader = open_loader(config, mesh)
            startup_timer.end_part("corpora")
            try:
                coordinator.any_rank(False)
                run_on_rank_0(lambda: stack.enter_context(run_lock(folder)), mesh)
                context, progress = start_run(
                    folder, config, mesh, loader, coordinator, watchdog, records, startup_timer
                )
                # Only now, because an error that the checks find must be a single line.
                log.info("launch: %s", launch.current_launch().describe())
                with context.saver:
                    return train_loop(context, progress)
            except StopRequested:  # during the start: there is nothing to save
                return signals.REQUEUE_EXIT_CODE


def train_loop(context: RunContext, progress: Progress) -> int:
    """Train until the schedule or a source ends, `run.stop_step` is reached, or a signal arrives. Return the exit code."""
    config, watchdog, reason = context.config, context.watchdog, None
    batches, final_step = iterate_batches(context, progress), find_final_step(context, progress)
    try:
        while progress.step < final_step:
            if is_due(progress.step, config.evaluate.every_steps) and progress.step != progress.validated_step:
                validate(context, progress)
            if progress.step == context.timeline.phase_span_at(progress.step).first_step:
                watchdog.use_start_timeout()
            result = timed_train_step(context, batches, progress.step)
            if result is None:  # without its damaged shards, a source has too few tokens for this step
                break
            progress.step, progress.cursor = progress.step + 1, result.cursor
            log_step(context, progress, result)
            watchdog.finish_step(result.record.step_seconds)
            if result.judgement.decision == "rollback":
                progress = roll_back(context, progress, result)
                close_prefetch(batches, context.coordinator.stop_signal.interruptible)
                batches, final_step = iterate_batches(context, progress), find_final_step(context, progress)
                continue
            if is_due(progress.step, config.debug.compare_replicas_every_steps):
                check_replicas(context.engine.model, context.mesh, progress.step)
            save_if_due(context, progress)
        if progress.step:
            save_final_checkpoint(context, progress)  # before the validation, which may fail
        if config.evaluate.every_steps and progress.step != progress.validated_step:
            validate(context, progress)
        reason = end_reason(context, progress)
    except StopRequested as stopped:
        with suppress(StopRequested):
            batches.throw(stopped)  # end the prefetch without waiting for it
        save_final_checkpoint(context, progress)
    context.enter_phase("end", progress.step)
    signal_name = context.coordinator.stop_signal.signal_name or signals.REMOTE_STOP_NAME
    context.sinks.write_end(progress.step, reason or f"stopped by {signal_name}")
    return 0 if reason else signals.REQUEUE_EXIT_CODE


def find_final_step(context: RunContext, progress: Progress) -> int:
    """Return the step at which the run ends if neither a signal nor damaged shards end it earlier."""
    end, _ = context.loader.find_end(progress.step, progress.cursor)
    return min(end, context.config.run.stop_step or end)


def end_reason(context: RunContext, progress: Progress) -> str:
    """Return why the run ends at this step, if no signal stopped it."""
    if progress.step == context.timeline.total_steps:
        return "finished"
    end, source = context.loader.find_end(progress.step, progress.cursor)
    if source and progress.step >= end:
        return f"data.max_epochs.{source}"
    return f"run.stop_step {context.config.run.stop_step}"


def timed_train_step(context: StepContext, batches: Iterator[Batch], step: int) -> StepResult | None:
    """Perform update number `step` (counted from 0) with the next batch. Return None if there is no next batch."""
    start_time = time.perf_counter()
    context.enter_phase("data", step + 1)
    if (batch := next(batches, None)) is None:
        return None
    data_seconds = time.perf_counter() - start_time
    loss, grad_norm, digests, judgement = train_step(context, batch, step)
    # The device may still be updating the weights. That time is counted in the next operation that waits for the device,
    # usually the next step, so each second is counted exactly once.
    step_seconds = time.perf_counter() - start_time
    record = build_step_record(context, step + 1, loss, grad_norm, step_seconds, data_seconds, judgement)
    return StepResult(record, batch.cursor, digests, judgement)


def train_step(context: StepContext, batch: Batch, step: int) -> tuple[float, float, Digests | None, Judgement]:
    """Compute the gradient of one global batch and update the weights, unless the guard rejects the step.

    Returns the mean loss in nats, the gradient norm before clipping, the digests of all rows and the guard's judgement. All are
    the same on every rank.
    """
    mesh, engine, phase = context.mesh, context.engine, context.timeline.phase_span_at(step).phase
    context.enter_phase("forward and backward", step + 1)
    local_loss = forward_backward(engine, batch, phase.micro_batch_size, mesh)
    context.enter_phase("update", step + 1)
    # Only rank 0 contributes its gradient norm, so all ranks decide from the same bits. Other ranks contribute norm * 0, which
    # is NaN if their norm is not finite.
    values = torch.stack((local_loss, engine.grad_norm() * float(mesh.rank == 0)))
    if batch.digests:
        digest_halves = torch.tensor(pack_u64(batch.digests), dtype=torch.float64)
        values = torch.cat((values.double(), to_device(digest_halves, mesh)))
    # The only place in a step where the host waits for the device: the guard needs the numbers.
    loss_sum, grad_norm, *digest_sums = sum_over_ranks_on_device(values)
    mean_loss = loss_sum / mesh.world_size
    judgement = context.guard.judge(phase, mean_loss, grad_norm)
    if judgement.decision == "update":
        engine.update(context.timeline.lr_at(step), grad_norm)
    else:
        engine.zero_grad()
    return mean_loss, grad_norm, unpack_u64(digest_sums, mesh.tp_size), judgement


def forward_backward(engine: Engine, batch: Batch, micro_batch_size: int, mesh: Mesh) -> Tensor:
    """Accumulate the gradient of the batch's mean loss over its micro-batches. Return this rank's mean loss in nats."""
    rows = to_device(batch.packed, mesh)
    starts = range(0, rows.shape[1], micro_batch_size)
    total_loss = torch.zeros((), device=mesh.device)
    for start in starts:
        loss = engine(*unpack_batch(rows[:, start : start + micro_batch_size])).mean() / len(starts)
        engine.backward(loss, is_last=start == starts[-1])
        total_loss += loss.detach()
    return total_loss


def log_step(context: RunContext, progress: Progress, result: StepResult) -> None:
    """Write the step to the metrics and the ledger, and log a warning if the guard rejected it."""
    context.enter_phase("records", progress.step)
    record, decision, reason = result.record, result.judgement.decision, result.judgement.reason
    context.sinks.write_step(record)
    if context.ledger and result.digests:
        context.ledger.write_step(progress.step, progress.cursor, result.digests)
    if context.mesh.rank == 0 and decision != "update":
        log.warning("step %d: %s; its update is skipped", progress.step, reason)
    if context.ledger and decision == "skip":
        context.ledger.write_bad_step(progress.step, record.loss, record.grad_norm, reason, decision)
