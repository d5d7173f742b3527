"""What a run starts with: model and optimizer with their values, the ledger, the tokenizer; checks that come before a step."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tandem.trainer import models
from tandem.trainer.checkpoint.async_save import Saver
from tandem.trainer.checkpoint.compatibility import check_continues, check_same_model
from tandem.trainer.checkpoint.layout import committed
from tandem.trainer.checkpoint.read import Snapshot, newest, opened, restore, set_weights
from tandem.trainer.checkpoint.write import model_facts, pass_over_later, retire
from tandem.trainer.checkpointing import begin_in_ledger, passed_over
from tandem.trainer.config import Data, RunConfig, dump
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import remote_files
from tandem.trainer.data.ledger import Ledger, copy_manifests, rollbacks
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.disk import write_whole
from tandem.trainer.distributed.coordination import Agreement
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, from_rank_0, on_rank_0
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard
from tandem.trainer.metrics.history import evaluated
from tandem.trainer.metrics.records import Sinks, open_sinks
from tandem.trainer.metrics.throughput import measured_peak_flops
from tandem.trainer.models import param_groups
from tandem.trainer.models.init import values
from tandem.trainer.models.mup import rules
from tandem.trainer.run_folder import open_run_folder
from tandem.trainer.run_state import Standing, Training
from tandem.trainer.runtime import Stopped

log = logging.getLogger(__name__)
NOT_OF_THE_WEIGHTS = ("init_std", "init_truncation_sigmas", "document_masking", "alibi_scaling")
"""Fields of the model that whoever trains given weights further may set anew."""
WARNED_OF = ("document_masking", "alibi_scaling")
"""Those of them with which the weights compute something else."""


class Laps:
    """Seconds of the parts of a start, from the birth of the process on."""

    def __init__(self) -> None:
        self.seconds = {"imports": time.time() - _born()}
        self._began = time.perf_counter()

    def end(self, part: str) -> None:
        """What was done since the part before is called so."""
        now = time.perf_counter()
        self.seconds[part], self._began = now - self._began, now


def _born() -> float:
    """Unix time at which this process began; now, where the system does not say. Source: proc(5), stat and uptime."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        alive = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        alive = 0.0
    return time.time() - alive


def start_run(
    folder: Path, config: RunConfig, mesh: Mesh, loader: Loader, agreement: Agreement, watchdog: Watchdog, records: ExitStack,
    laps: Laps,
) -> tuple[Training, Standing]:  # fmt: skip
    """Build everything a run needs, from its newest valid checkpoint if it has one, and open its records.

    `records` closes the records. Raises: Stopped on all ranks if one was told to stop; UserError as the checks below.
    """
    watchdog.at("checkpoint")
    continues = from_rank_0(bool(committed(folder / "checkpoints")))
    initial = None if continues else imported(config, mesh)
    snapshot = newest(folder / "checkpoints", mesh)
    agreement.any_rank(False)
    laps.end("checkpoint checked")
    if snapshot:
        check_continues(config, snapshot, loader)
        skip_shards(loader, snapshot.manifest.get("skipped", {}))
    watchdog.at("tokenizer")
    on_rank_0(partial(open_folder, folder, config, snapshot, agreement), mesh)
    watchdog.at("model")
    engine = build_engine(config, mesh, snapshot, initial)
    for source in (snapshot, initial):
        if source:
            source.close()
    laps.end("model")
    at, guard, passed = take_up(folder, config, loader, mesh, snapshot)
    agreement.any_rank(False)
    watchdog.at("records")
    sinks, ledger = on_rank_0(partial(open_records, folder, config, loader, at.step), mesh) or (
        Sinks([], at.step),
        None,
    )
    records.callback(sinks.close)
    if ledger:
        records.callback(ledger.close)
        after = snapshot.manifest["ledger_lines"] if snapshot else 0
        begin_in_ledger(ledger, config, loader, mesh.dp_size, at.step, at.cursor, after=after, passed=passed)
    peak_flops = config.hardware.peak_flops if config.hardware else measured_peak_flops(mesh.device)
    training = Training(
        config, mesh, Timeline(config.schedule), engine, peak_flops, guard, folder, loader, sinks,
        Saver(folder / "checkpoints", mesh, config.checkpoint.keep), agreement, watchdog, ledger, watch=watchdog.at,
    )  # fmt: skip
    laps.end("records")
    sinks.start(
        tokens=training.timeline.tokens_before(at.step), world_size=mesh.world_size, tp_size=mesh.tp_size,
        dp_size=mesh.dp_size, total_steps=training.timeline.total_steps, total_tokens=training.timeline.total_tokens,
        start_seconds=laps.seconds,
    )  # fmt: skip
    return training, at


def open_folder(folder: Path, config: RunConfig, snapshot: Snapshot | None, agreement: Agreement) -> None:
    """Write this start's config, environment and tokenizer; only the checkpoints up to the snapshot count. Called by rank 0."""
    if snapshot:
        pass_over_later(snapshot.folder)
        retire(snapshot.folder, config.checkpoint.keep)  # what a kill has left of older ones
    open_run_folder(folder, dump(config))
    with suppress(Stopped), agreement.stop_signal.interrupting():  # a store that does not answer takes minutes
        keep_tokenizer(folder, config.data)


def open_records(folder: Path, config: RunConfig, loader: Loader, step: int) -> tuple[Sinks, Ledger]:
    """Open the sinks of metrics and the ledger, beside which lie copies of the manifests. Called by rank 0."""
    sinks = open_sinks(folder, config, rank=0, resumed_step=step)
    copy_manifests(folder, loader.manifests)
    return sinks, Ledger(folder)


def take_up(
    folder: Path, config: RunConfig, loader: Loader, mesh: Mesh, snapshot: Snapshot | None
) -> tuple[Standing, Guard, dict[str, tuple[int, int]]]:
    """Where the run goes on, how the guard stands there, and the rows of each source that a rollback passed over.

    A process that was ended after a rollback goes on behind the rows that the rollback passed over.
    """
    facts: dict[str, Any] = snapshot.manifest if snapshot else {"cursor": {}, "ledger_lines": 0}
    step, cursor = snapshot.step if snapshot else 0, facts["cursor"]
    earlier = from_rank_0(rollbacks(folder, step, facts["ledger_lines"]) if mesh.rank == 0 and snapshot else None)
    guard = Guard(config.guard, facts.get("guard"), {step: earlier.num} if earlier else {})
    passed = {}
    if earlier and earlier.cursor:
        passed = passed_over(cursor, earlier.cursor)
        cursor = earlier.cursor
        skip_shards(loader, earlier.skipped)
    # A signal may have come between a save and the validation of its step.
    evaluated_step = step if from_rank_0(mesh.rank == 0 and (not step or evaluated(folder, step))) else None
    return Standing(step, dict(cursor), step if snapshot else None, evaluated_step), guard, passed


def skip_shards(loader: Loader, skipped: Mapping[str, Sequence[str]]) -> None:
    """From here on the loader cuts no row from the files, by source."""
    for source, files in skipped.items():
        for file in files:
            loader.skip(source, file)


def build_engine(config: RunConfig, mesh: Mesh, snapshot: Snapshot | None, initial: Snapshot | None = None) -> Engine:
    """Model and optimizer with the snapshot's state, or the initial snapshot's weights, or initial values."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    table = rules(config.model, config.mup)
    with mesh.device:
        model = models.build(config.model, config.mup, mesh, dtype=dtype, recompute=config.parallel.recompute)
    engine = Engine(
        config,
        model,
        param_groups.adamw(param_groups.groups(model, table, config.optim), config.optim, mesh.device),
        mesh,
    )
    if snapshot:
        restore(engine, snapshot, mesh)
        log.info("continuing from %s", snapshot.folder)
    elif initial:
        set_weights(engine, initial.weight, mesh)
    else:
        sigmas = config.model.init_truncation_sigmas
        set_weights(engine, values(model, table, seed=config.run.seed, truncation_sigmas=sigmas), mesh)
    return engine


def keep_tokenizer(folder: Path, data: Data) -> None:
    """The run folder holds the tokenizer of the corpora: with it, exports need nothing but the run."""
    address = remote_files.below(next(iter(data.sources.values())), TOKENIZER_FILE)
    try:
        content = remote_files.content(address, data.cache)
    except OSError as error:
        log.warning("%s: cannot be read (%s); the run trains without it, its exports have no tokenizer", address, error)
    else:
        write_whole(folder / TOKENIZER_FILE, content)


def check_held_out(config: RunConfig, loader: Loader) -> None:
    """Raises UserError when validation would need more held-out tokens than there are, before a step is made."""
    for phase in config.schedule.phases if config.evaluate.every_steps else []:
        loader.validation(phase, config.evaluate.tokens)


def imported(config: RunConfig, mesh: Mesh) -> Snapshot | None:
    """The snapshot that `run.initial_weights` names, if it names one.

    Fields of `NOT_OF_THE_WEIGHTS` may differ from the snapshot's; a warning names those that change what its weights
    compute.

    Raises: UserError when any other field of model or mup differs.
    """
    if config.run.initial_weights is None:
        return None
    snapshot = opened(Path(config.run.initial_weights), mesh)
    remedy = "the weights are made for that; take their value or other weights"
    check_same_model(config, snapshot, f"run.initial_weights {snapshot.folder}", remedy, free=NOT_OF_THE_WEIGHTS)
    ours, theirs = model_facts(config.model, config.mup)["model"], snapshot.manifest["model"]
    differing = [name for name in WARNED_OF if ours.get(name) != theirs.get(name)]
    if differing and mesh.rank == 0:
        said = ", ".join(f"model.{name} {ours.get(name)} (there {theirs.get(name)})" for name in differing)
        log.warning("training does not go on as run.initial_weights %s was made: %s", snapshot.folder, said)
    return snapshot
