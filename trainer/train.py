"""The run, from config to last checkpoint: read this first.

`run` sets everything up, resumes if it can, and `loop` is the list of verbs: read, compute, update, record, evaluate, save.
What varies with time comes from the Timeline as a pure function of the step, and where the data stands rides in the batch;
so all that a checkpoint adds to the config is tensors and a cursor.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import models, optim, runtime
from trainer.checkpoint.layout import committed
from trainer.checkpoint.read import Snapshot, load_weights, newest, restore, set_masters
from trainer.checkpoint.write import model_facts, save
from trainer.config import Data, RunConfig, check_world, dump
from trainer.costs import flops_per_token
from trainer.data import remote
from trainer.data.damage import Met, agreed, agreed_batches
from trainer.data.loader import Batch, Loader
from trainer.data.manifest import TOKENIZER_FILE
from trainer.disk import write_whole
from trainer.engine import Engine
from trainer.evaluate import validation_loss
from trainer.ledger import Digests, Ledger, copy_manifests, halves, joined
from trainer.metrics import Sinks, StepRecord, open_sinks, throughput
from trainer.models.init import values
from trainer.models.mup import rules
from trainer.parallel.mesh import (
    Mesh,
    from_rank_0,
    gather_to_all,
    launched_world_size,
    on_rank_0,
    started,
    sum_over_ranks,
)
from trainer.resume import check_continues, imported
from trainer.timeline import Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stepper:
    """What a step needs; nothing in it changes but the engine's weights."""

    config: RunConfig
    mesh: Mesh
    timeline: Timeline
    engine: Engine
    peak_flops: float


@dataclass(frozen=True)
class Training(Stepper):
    """What a run needs besides: where its rows come from, where records and checkpoints go."""

    folder: Path
    loader: Loader
    sinks: Sinks
    ledger: Ledger | None = None
    """Rank 0's."""


def run(config: RunConfig) -> int:
    """The run is as far as it was asked to go and its last checkpoint is committed.

    Returns the exit code: 0 finished, REQUEUE_EXIT_CODE saved on a signal, to be started again with the same command.
    Raises: UserError for what the user can mend, RuntimeError when the loss or the gradient is not finite.
    """
    check_world(config, launched_world_size())
    stop_signal = runtime.StopSignal()
    runtime.stop_with_launcher()
    with started(config.parallel.tp_size) as mesh:
        runtime.start_logging(mesh.rank)
        if config.debug.deterministic:
            runtime.make_deterministic()
        folder = Path(config.run.root) / config.run.name
        loader = Loader(
            config.data, config.schedule, seed=config.run.seed, vocab=config.model.vocab,
            dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
        )  # fmt: skip
        check_held_out(config, loader)
        continues = from_rank_0(bool(committed(folder / "checkpoints")))
        initial = None if continues else imported(config, mesh)
        with ExitStack() as stack:
            on_rank_0(lambda: stack.enter_context(runtime.held(folder)), mesh)
            return run_in(folder, config, mesh, loader, initial, stop_signal)


def run_in(
    folder: Path,
    config: RunConfig,
    mesh: Mesh,
    loader: Loader,
    initial: Snapshot | None,
    stop_signal: runtime.StopSignal,
) -> int:
    """`run`, once the folder is ours."""
    snapshot = newest(folder / "checkpoints", mesh)
    if snapshot:
        check_continues(config, snapshot, loader)
        for source, files in snapshot.manifest.get("skipped", {}).items():
            for file in files:
                loader.skip(source, file)
    on_rank_0(lambda: runtime.open_run_folder(folder, dump(config)), mesh)
    engine = build_engine(config, mesh, snapshot, initial)
    step, cursor = (snapshot.step, snapshot.manifest["cursor"]) if snapshot else (0, None)
    for source in (snapshot, initial):
        if source:
            source.close()
    sinks = on_rank_0(lambda: open_sinks(folder, config, rank=0, resumed_step=step), mesh) or Sinks([], step)
    peak_flops = config.hardware.peak_flops if config.hardware else runtime.measured_peak_flops(mesh.device)
    after = snapshot.manifest["ledger_lines"] if snapshot else 0
    ledger = on_rank_0(lambda: open_ledger(folder, config, loader, step, cursor, after, mesh.dp_size), mesh)
    training = Training(config, mesh, Timeline(config.schedule), engine, peak_flops, folder, loader, sinks, ledger)
    try:
        return loop(training, step, cursor, stop_signal)
    finally:
        sinks.close()
        if ledger:
            ledger.close()


def open_ledger(
    folder: Path, config: RunConfig, loader: Loader, step: int, cursor: dict[str, int] | None, after: int, dp_size: int
) -> Ledger:
    """The run folder's ledger, which has this start on record, and copies of the manifests that it needs to be read."""
    copy_manifests(folder, loader.manifests)
    keep_tokenizer(folder, config.data)
    ledger = Ledger(folder)
    ledger.start(
        step, cursor or {}, order=loader.order, phases=[dataclasses.asdict(phase) for phase in config.schedule.phases],
        fingerprints=loader.fingerprints, skipped=loader.skipped, dp_size=dp_size, after=after,
    )  # fmt: skip
    return ledger


def keep_tokenizer(folder: Path, data: Data) -> None:
    """The run folder holds the tokenizer of the corpora: with it, exports need nothing but the run."""
    address = remote.below(next(iter(data.sources.values())), TOKENIZER_FILE)
    try:
        content = remote.content(address, data.cache)
    except OSError as error:
        log.warning("%s: cannot be read (%s); the run trains without it, its exports have no tokenizer", address, error)
    else:
        write_whole(folder / TOKENIZER_FILE, content)


def loop(training: Training, step: int, cursor: dict[str, int] | None, stop_signal: runtime.StopSignal) -> int:
    """Steps from `step` until the schedule, its sources, `run.stop_step` or a signal end them; returns the exit code."""
    config, timeline, sinks = training.config, training.timeline, training.sinks
    last = min(training.loader.end(step, cursor)[0], config.run.stop_step or timeline.total_steps)
    sinks.start(
        tokens=timeline.tokens_before(step), world_size=training.mesh.world_size, tp_size=training.mesh.tp_size,
        dp_size=training.mesh.dp_size, total_steps=timeline.total_steps, total_tokens=timeline.total_tokens,
    )  # fmt: skip
    batches, stopping, saved_step, evaluated_step = batches_from(training, step, cursor), False, step, step
    while step < last and not stopping:
        if made := timed_step(training, batches, step, stop_signal):
            step += 1
            record, cursor, digests, stopping = made
            sinks.step(record)
            if training.ledger and digests:
                training.ledger.step(step, cursor, digests)
        else:  # a shard left out just now was to feed this step
            last = step
        if (stopping or step == last or due(step, config.checkpoint.every_steps)) and step != saved_step:
            assert cursor is not None, "a step was made"
            save_checkpoint(training, step, cursor)
            saved_step = step
        # Saved first: whatever held-out rows do, the step is not lost.
        evaluating = due(step, config.evaluate.every_steps) or (config.evaluate.every_steps and step == last)
        if evaluating and step != evaluated_step:
            evaluate(training, step)
            evaluated_step = step
    if step >= last:
        sinks.end(step, end_reason(training, step, cursor))
        return 0
    sinks.end(step, f"stopped by {stop_signal.name or 'a signal to another rank'}")
    return runtime.REQUEUE_EXIT_CODE


def end_reason(training: Training, step: int, cursor: dict[str, int] | None) -> str:
    """Why the run ends with `step`, of all that can end it but a signal."""
    end, source = training.loader.end(step, cursor)
    if step == training.timeline.total_steps:
        return "finished"
    return f"data.max_epochs.{source}" if source and step >= end else f"run.stop_step {training.config.run.stop_step}"


def batches_from(training: Training, step: int, cursor: dict[str, int] | None) -> Iterator[Batch]:
    """The loader's batches from `step` on; where `data.damaged_shards` says skip, without the shards that any rank finds so."""
    if training.config.data.damaged_shards == "stop":
        return training.loader.batches(step, cursor)
    return agreed_batches(
        training.loader, step, cursor, partial(met_by_any, mesh=training.mesh), partial(leave_out, training)
    )


def met_by_any(met: Met | None, mesh: Mesh) -> list[Met]:
    """What this and all other ranks have met, the same on every rank."""
    [number] = sum_over_ranks([float(met is not None)], mesh)
    return sorted({each for each in gather_to_all(met) if each}) if number else []


def leave_out(training: Training, step: int, met: Met) -> None:
    """From the update number `step` on no row is cut from the shard, and that is on record."""
    source, file = met
    if training.mesh.rank == 0:
        log.warning("data.sources.%s: shard %s is damaged; it is left out from step %d on", source, file, step + 1)
    if training.ledger:
        training.ledger.skip(step + 1, source, file)
    training.loader.skip(source, file)


def timed_step(
    stepper: Stepper, batches: Iterator[Batch], step: int, stop_signal: runtime.StopSignal
) -> tuple[StepRecord, dict[str, int], Digests | None, bool] | None:
    """Update number `step`, on the next batch. Returns its record, the cursor after the batch, the evidence of what was read
    if batches carry it, and whether any rank was told to stop; None, with nothing done, where there is no next batch.
    """
    began = time.perf_counter()
    if (batch := next(batches, None)) is None:
        return None
    data_seconds = time.perf_counter() - began
    loss, gradient_norm, digests, stopping = one_step(stepper, batch, step, stop_signal)
    record = record_of(stepper, step + 1, loss, gradient_norm, time.perf_counter() - began, data_seconds)
    return record, batch.cursor, digests, stopping


def one_step(
    stepper: Stepper, batch: Batch, step: int, stop_signal: runtime.StopSignal
) -> tuple[float, float, Digests | None, bool]:
    """One update on one global batch. Returns its mean loss in nats, the gradient norm before clipping, the evidence of all
    its rows, and whether any rank was told to stop.
    """
    mesh, engine = stepper.mesh, stepper.engine
    total = accumulate(engine, batch, stepper.timeline.phase_at(step).phase.micro_rows, mesh)
    values = [float(total), float(stop_signal.name is not None), *halves(batch.evidence)]
    summed, stops, *evidence = sum_over_ranks(values, mesh)
    digests = joined(evidence, mesh.tp_size)
    mean_loss = summed / mesh.world_size
    gradient_norm = engine.update(stepper.timeline.lr_at(step))
    if not (math.isfinite(mean_loss) and math.isfinite(gradient_norm)):
        raise RuntimeError(
            f"step {step + 1}: loss {mean_loss}, gradient norm {gradient_norm}: not finite; nothing was saved after the last "
            "checkpoint; lower schedule.lr.peak or look at the data of this step"
        )
    return mean_loss, gradient_norm, digests, stops > 0


def accumulate(engine: Engine, batch: Batch, micro_rows: int, mesh: Mesh) -> Tensor:
    """The gradient of the batch's mean loss is ready for the update; returns that loss, of this rank's rows, in nats."""
    starts = range(0, len(batch.tokens), micro_rows)
    total = torch.zeros((), device=mesh.device)
    for start in starts:
        part = slice(start, start + micro_rows)
        inputs = (batch.tokens[part], batch.targets[part], batch.documents[part])
        loss = engine(*(tensor.to(mesh.device, non_blocking=True) for tensor in inputs)).mean() / len(starts)
        engine.accumulate(loss, last=start == starts[-1])
        total += loss.detach()
    return total


def evaluate(training: Training, step: int) -> None:
    """The validation loss of the weights after `step` is on record, unless damage has left no held-out row to take it of."""
    phase = training.timeline.phase_at(step - 1).phase
    read = partial(training.loader.validation, phase, training.config.evaluate.tokens)
    batches: Iterable[Batch]
    if training.config.data.damaged_shards == "stop":
        batches = read()
    else:
        exchange = partial(met_by_any, mesh=training.mesh)
        batches = agreed(lambda: list(read()), exchange, partial(leave_out, training, step))
    loss = validation_loss(training.engine.model, batches, training.mesh)
    if loss is not None:
        training.sinks.validation(step, training.timeline.tokens_before(step), loss)
    elif training.mesh.rank == 0:
        files = ", ".join(f"{source}/{file}" for source, files in training.loader.skipped.items() for file in files)
        log.warning("step %d: no validation loss: left out as damaged are %s, and no held-out row is left", step, files)


def save_checkpoint(training: Training, step: int, cursor: dict[str, int]) -> None:
    """A committed checkpoint of `step` lies in the run folder, and its ledger is not behind it."""
    began = time.perf_counter()
    ledger_lines = training.ledger.sync() if training.ledger else 0  # rank 0's fact; that rank writes the manifest
    facts = {
        **model_facts(training.config.model, training.config.mup),
        "tokens": training.timeline.tokens_before(step),
        "cursor": cursor,
        "ledger_lines": ledger_lines,
        "fingerprints": training.loader.fingerprints,
        "eos_token": training.loader.eos_token,
        "order": training.loader.order,
        "skipped": training.loader.skipped,
        "phases": [dataclasses.asdict(phase) for phase in training.config.schedule.phases],
    }
    root, keep = training.folder / "checkpoints", training.config.checkpoint.keep
    size = save(root, step, training.engine, training.mesh, facts=facts, keep=keep)
    training.sinks.checkpoint(step, time.perf_counter() - began, size)


def build_engine(config: RunConfig, mesh: Mesh, snapshot: Snapshot | None, initial: Snapshot | None = None) -> Engine:
    """Model and optimizer with the snapshot's state, or the initial snapshot's weights, or initial values."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    table = rules(config.model, config.mup)
    with mesh.device:
        model = models.build(config.model, config.mup, mesh, dtype=dtype, recompute=config.parallel.recompute)
    read: Callable[[str], Tensor] = values(
        model, table, seed=config.run.seed, truncation_sigmas=config.model.init_truncation_sigmas
    )
    if given := snapshot or initial:
        read = given.weight
    load_weights(model, read, mesh)
    optimizer = optim.adamw(optim.groups(model, table, config.optim), config.optim, mesh.device)
    engine = Engine(config, model, optimizer, mesh)
    if snapshot:
        restore(engine, snapshot, mesh)
        log.info("continuing from %s", snapshot.folder)
    elif dtype != torch.float32:
        set_masters(engine, read, mesh)
    return engine


def check_held_out(config: RunConfig, loader: Loader) -> None:
    """Raises UserError when validation would need more held-out tokens than there are, before a step is made."""
    for phase in config.schedule.phases if config.evaluate.every_steps else []:
        loader.validation(phase, config.evaluate.tokens)


def record_of(
    stepper: Stepper, step: int, loss: float, gradient_norm: float, step_seconds: float, data_seconds: float
) -> StepRecord:
    """The record of the step that was just finished, the `step`-th."""
    config, mesh, timeline = stepper.config, stepper.mesh, stepper.timeline
    phase = timeline.phase_at(step - 1).phase
    speed = throughput(
        phase.batch_tokens, step_seconds,
        flops_per_token=flops_per_token(config.model, phase.seq_len, causal=False),
        causal_flops_per_token=flops_per_token(config.model, phase.seq_len, causal=True),
        devices=mesh.world_size, peak_flops=stepper.peak_flops,
    )  # fmt: skip
    memory: Any = torch.cuda.max_memory_allocated() / 2**30 if mesh.device.type == "cuda" else None
    return StepRecord(
        step=step, tokens=timeline.tokens_before(step), phase=phase.name, seq_len=phase.seq_len, rows=phase.rows,
        loss=loss, lr=timeline.lr_at(step - 1), gradient_norm=gradient_norm, step_seconds=step_seconds,
        data_seconds=data_seconds, tokens_per_second=speed.tokens_per_second, mfu=speed.mfu,
        mfu_causal=speed.mfu_causal, memory_gib=memory, time=time.time(),
    )  # fmt: skip


def due(step: int, every_steps: int) -> bool:
    """Whether something done every so many steps is to be done after `step`; 0 is never."""
    return every_steps > 0 and step % every_steps == 0
