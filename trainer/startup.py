"""The start of a run: build its weights, optimizer, data and records, from the newest checkpoint if there is one.

The checks that must pass before the first step are also here.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tandem.trainer import models
from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.checkpoint.compatibility import (
    check_initial_model,
    check_initial_tokenizer,
    check_resumable,
    check_saved_model,
)
from tandem.trainer.checkpoint.layout import list_committed, model_metadata
from tandem.trainer.checkpoint.read import Checkpoint, load_master_weights, open_checkpoint, open_newest, restore_state
from tandem.trainer.checkpoint.write import prune, reject_later
from tandem.trainer.checkpointing import skipped_ranges
from tandem.trainer.config import DataConfig, TrainConfig, UserError, dump_config, notices
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data import remote_files
from tandem.trainer.data.ledger import Ledger, RollbackHistory, copy_manifests, read_rollbacks
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import TOKENIZER_FILE, CorpusManifest, read_corpus_tokenizer
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.coordination import Coordinator
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, broadcast_from_rank_0, run_on_rank_0
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.guard import Guard
from tandem.trainer.metrics.history import has_validation, last_learning_rate
from tandem.trainer.metrics.records import Sinks, open_sinks
from tandem.trainer.metrics.throughput import measure_peak_flops
from tandem.trainer.models import param_groups
from tandem.trainer.models.init import initial_values
from tandem.trainer.models.mup import parameter_rules
from tandem.trainer.run_folder import CONFIG_FILE, load_previous_config, named_errors, open_run_folder
from tandem.trainer.run_state import Progress, RunContext
from tandem.trainer.runtime.signals import StopRequested

log = logging.getLogger(__name__)
MAX_UNUSED_IDS_SHARE = 1.0
"""Ids beyond the corpora's, as a share of those. Padding and room for new tokens take a few percent."""
WARNED_MODEL_FIELDS = ("document_masking", "alibi_scaling")
"""The changeable fields that affect what the weights compute. A difference in one of them is logged."""


class StartupTimer:
    """Measures the parts of a start in seconds, from the creation of the process."""

    def __init__(self) -> None:
        self.part_seconds = {"imports": time.time() - _process_start_time()}
        self._part_start = time.perf_counter()

    def end_part(self, part: str) -> None:
        """Record the time since the end of the previous part under this name."""
        end_time = time.perf_counter()
        self.part_seconds[part], self._part_start = end_time - self._part_start, end_time


def _process_start_time() -> float:
    """Return the Unix time at which this process was created, or now if the system does not provide it.

    Source: proc(5), stat and uptime.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_seconds = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        age_seconds = 0.0
    return time.time() - age_seconds


@contextmanager
def open_record_stack(watchdog: Watchdog) -> Iterator[ExitStack]:
    """Yield a stack that closes the records. Enter it before `broadcast_stop`, in which the ranks exchange how the run ended.

    Before the records close after a UserError, the watchdog enters the phase "end", whose limit allows for a slow server.
    """
    with ExitStack() as records:
        try:
            yield records
        except UserError:
            watchdog.enter_phase("end")
            raise


def open_loader(config: TrainConfig, mesh: Mesh) -> Loader:
    """Open the sources of the config. Raises: UserError, also if validation needs more held-out tokens than a source has."""
    loader = Loader(
        config.data, config.schedule, seed=config.run.seed, vocab_size=config.model.vocab_size,
        dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
    )  # fmt: skip
    for phase in config.schedule.phases if config.evaluate.every_steps else []:
        loader.validation_batches(phase, config.evaluate.tokens)
    return loader


def start_run(
    folder: Path, config: TrainConfig, mesh: Mesh, loader: Loader, coordinator: Coordinator, watchdog: Watchdog,
    records: ExitStack, startup_timer: StartupTimer,
) -> tuple[RunContext, Progress]:  # fmt: skip
    """Build everything a run needs, from its newest undamaged checkpoint if it has one, and open its records.

    The stack `records` will close them.
    Raises: StopRequested on all ranks if one received a signal; UserError if a check below fails.
    """
    watchdog.enter_phase("checkpoint")
    has_checkpoint = broadcast_from_rank_0(bool(list_committed(folder / "checkpoints")))
    initial_checkpoint = None if has_checkpoint else open_initial_weights(config, mesh)
    if initial_checkpoint and config.run.init_from_tokenizer == "same":
        check = partial(check_initial_tokenizer, initial_checkpoint, config.data, loader.manifests)
        if run_on_rank_0(check, mesh) is False:
            message = "run.init_from: there is no %s, so it is not known whether the corpora have the tokenizer of its weights"
            log.warning(message, initial_checkpoint.run_folder / TOKENIZER_FILE)
    checkpoint = open_newest(folder / "checkpoints", mesh)
    coordinator.any_rank(False)
    startup_timer.end_part("checkpoint checked")
    if checkpoint:
        check_resumable(config, checkpoint, loader.fingerprints, loader.shuffle_settings)
        skip_shards(loader, checkpoint.manifest.get("skipped_shards", {}))
    watchdog.enter_phase("tokenizer")
    run_on_rank_0(named_errors()(partial(open_folder, folder, config, loader.manifests, checkpoint, coordinator)), mesh)
    coordinator.any_rank(False)  # stop now, because building the model takes seconds
    startup_timer.end_part("run folder")
    watchdog.enter_phase("model")
    engine = build_engine(config, mesh, checkpoint, initial_checkpoint)
    for source in (checkpoint, initial_checkpoint):
        if source:
            source.close()
    startup_timer.end_part("model")
    progress, guard, ranges_to_skip = restore_progress(folder, config, loader, mesh, checkpoint)
    coordinator.any_rank(False)
    watchdog.enter_phase("records")
    opened_records = run_on_rank_0(named_errors()(partial(open_records, folder, config, loader, progress.step)), mesh)
    sinks, ledger = opened_records or (Sinks([], progress.step), None)
    records.callback(sinks.close)
    if ledger:
        records.callback(ledger.close)
        ledger.write_start(
            progress.step, progress.cursor, **loader.ledger_fields(), skipped_ranges=ranges_to_skip,
            num_ledger_lines=checkpoint.manifest["num_ledger_lines"] if checkpoint else 0,
        )  # fmt: skip
    peak_flops = config.hardware.peak_flops if config.hardware else measure_peak_flops(mesh.device)
    saver = CheckpointSaver(folder / "checkpoints", mesh, config.checkpoint.keep_last)
    timeline = Timeline(config.schedule)
    context = RunContext(
        config, mesh, timeline, engine, peak_flops, guard, folder, loader, sinks, saver, coordinator, watchdog, ledger,
        enter_phase=watchdog.enter_phase,
    )  # fmt: skip
    startup_timer.end_part("records")
    sinks.write_start(
        tokens=timeline.tokens_before(progress.step), world_size=mesh.world_size, tp_size=mesh.tp_size,
        dp_size=mesh.dp_size, total_steps=timeline.total_steps, total_tokens=timeline.total_tokens,
        start_seconds=startup_timer.part_seconds,
    )  # fmt: skip
    return context, progress


def open_folder(
    folder: Path, config: TrainConfig, corpora: Mapping[str, CorpusManifest], checkpoint: Checkpoint | None,
    coordinator: Coordinator,
) -> None:  # fmt: skip
    """Write this start's config, environment and tokenizer, and reject checkpoints newer than `checkpoint`. Rank 0 only.

    Raises: UserError if the config of an earlier start has another model than `checkpoint`, or if there is no checkpoint and
    this version cannot load that config.
    """
    previous = None
    try:
        previous = load_previous_config(folder)
    except UserError as error:
        if not checkpoint:
            raise
        log.warning("%s; it is kept, but not compared", error)
    if checkpoint and previous:
        check_saved_model(previous, folder / CONFIG_FILE, checkpoint)
    if checkpoint:
        reject_later(checkpoint.folder)
        prune(checkpoint.folder, config.checkpoint.keep_last)  # a kill may have interrupted the last prune
    log_notices(folder, config, previous, checkpoint.step if checkpoint else 0)
    open_run_folder(folder, dump_config(config))
    with suppress(StopRequested), coordinator.stop_signal.interruptible():  # an unreachable server blocks for minutes
        warn_of_unused_ids(config, corpora)
        copy_tokenizer(folder, config.data, next(iter(corpora.values())))


def log_notices(folder: Path, config: TrainConfig, previous: TrainConfig | None, step: int) -> None:
    """Log what differs from the last start, old -> new, and what may surprise in the learning rate after `step`."""
    timeline = Timeline(config.schedule)
    changes = notices.changed_values(previous, config) if previous else []
    last_lr = last_learning_rate(folder, step) if step else None
    if last_lr is not None:
        jump = notices.learning_rate_jump(timeline, step, last_lr, Timeline(previous.schedule) if previous else None)
        changes += [jump] if jump else []
    for line in changes + notices.learning_rate_notices(timeline):
        log.warning("%s", line)


def open_records(folder: Path, config: TrainConfig, loader: Loader, step: int) -> tuple[Sinks, Ledger]:
    """Open the sinks and the ledger, and copy the corpora's manifests next to them. Rank 0 only."""
    sinks = open_sinks(folder, config, rank=0, start_step=step)
    copy_manifests(folder, loader.manifests)
    return sinks, Ledger(folder)


def restore_progress(
    folder: Path, config: TrainConfig, loader: Loader, mesh: Mesh, checkpoint: Checkpoint | None
) -> tuple[Progress, Guard, dict[str, tuple[int, int]]]:
    """Return where the run continues, the guard at that step, and the rows of each source that a rollback skipped.

    If a process was killed after a rollback, the next one continues after the rows that the rollback skipped.
    """
    manifest: dict[str, Any] = checkpoint.manifest if checkpoint else {"cursor": {}, "num_ledger_lines": 0}
    step, cursor = checkpoint.step if checkpoint else 0, manifest["cursor"]
    found = None
    if mesh.rank == 0 and checkpoint:
        with named_errors():
            found = read_rollbacks(folder, step, manifest["num_ledger_lines"])
    fields: list[Any] | None = broadcast_from_rank_0(found and list(found))
    history = RollbackHistory(*fields) if fields else None
    guard = Guard(config.guard, manifest.get("guard"), {step: history.num_rollbacks} if history else {})
    ranges = {}
    if history and history.cursor:
        ranges = skipped_ranges(cursor, history.cursor)
        cursor = history.cursor
        skip_shards(loader, history.skipped_shards)
    # A signal may have ended the last process between the save and the validation of this step.
    is_validated = broadcast_from_rank_0(mesh.rank == 0 and (not step or has_validation(folder, step)))
    saved_step, validated_step = step if checkpoint else None, step if is_validated else None
    return Progress(step, dict(cursor), saved_step, validated_step), guard, ranges


def skip_shards(loader: Loader, skipped: Mapping[str, Sequence[str]]) -> None:
    """Stop reading from these files, which are listed by source."""
    for source, files in skipped.items():
        for file in files:
            loader.skip_shard(source, file)


def build_engine(
    config: TrainConfig, mesh: Mesh, checkpoint: Checkpoint | None, initial_checkpoint: Checkpoint | None = None
) -> Engine:
    """Build model and optimizer. Load the checkpoint's state, the weights of the initial checkpoint, or initial values."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    mup_rules = parameter_rules(config.model, config.mup)
    with mesh.device:
        model = models.build_model(config.model, config.mup, mesh, dtype=dtype, recompute=config.parallel.recompute)
    groups = param_groups.build_param_groups(model, mup_rules, config.optim)
    engine = Engine(config, model, param_groups.build_adamw(groups, config.optim, mesh.device), mesh)
    if checkpoint:
        restore_state(engine, checkpoint, mesh)
        log.info("continuing from %s", checkpoint.folder)
    elif initial_checkpoint:
        load_master_weights(engine, initial_checkpoint.read_weight, mesh)
    else:
        sigmas = config.model.init_truncation_sigmas
        values = initial_values(model, mup_rules, seed=config.run.seed, truncation_sigmas=sigmas)
        load_master_weights(engine, values, mesh)
    return engine


def copy_tokenizer(folder: Path, data: DataConfig, corpus: CorpusManifest) -> None:
    """Copy the tokenizer of the first source, `corpus`, into the run folder, so that an export needs no corpus.

    Raises: UserError if the file is not the one that the corpus was prepared with.
    """
    corpus_folder = next(iter(data.sources.values()))
    address = remote_files.join_address(corpus_folder, TOKENIZER_FILE)
    try:
        content = read_corpus_tokenizer(corpus_folder, corpus, data.cache)
    except OSError as error:
        message = "%s: cannot be read (%s); the run trains without it, but its exports lack a tokenizer"
        log.warning(message, address, error)
    else:
        atomic_write(folder / TOKENIZER_FILE, content)


def open_initial_weights(config: TrainConfig, mesh: Mesh) -> Checkpoint | None:
    """Open the checkpoint that `run.init_from` names, if it names one.

    Fields of `CHANGEABLE_MODEL_FIELDS` may differ from the checkpoint's. A warning names those that change what its weights
    compute.
    Raises: UserError if any other field of model or mup differs.
    """
    if config.run.init_from is None:
        return None
    checkpoint = open_checkpoint(Path(config.run.init_from), mesh)
    check_initial_model(config, checkpoint)
    requested, saved = model_metadata(config.model, config.mup)["model"], checkpoint.manifest["model"]
    differing = [name for name in WARNED_MODEL_FIELDS if requested.get(name) != saved.get(name)]
    if differing and mesh.rank == 0:
        values = ", ".join(f"model.{name} {saved.get(name)} instead of {requested.get(name)}" for name in differing)
        log.warning("run.init_from %s: its weights were trained with other settings: %s", checkpoint.folder, values)
    return checkpoint


def warn_of_unused_ids(config: TrainConfig, corpora: Mapping[str, CorpusManifest]) -> None:
    """Log a warning if the model has many more ids than the corpora."""
    model, used_ids = config.model, max(corpus.vocab for corpus in corpora.values())
    unused_ids = model.vocab_size - used_ids
    if unused_ids > MAX_UNUSED_IDS_SHARE * used_ids:
        parameters = unused_ids * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        message = "model.vocab_size: %s, but the corpora have %s ids: %s parameters are never trained; lower it"
        log.warning(message, *(f"{number:,}" for number in (model.vocab_size, used_ids, parameters)))
