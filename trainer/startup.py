"""What a run starts with: model and optimizer with their values, the ledger, the tokenizer; checks that come before a step."""

import dataclasses
import logging
from pathlib import Path

import torch

from tandem.trainer import models
from tandem.trainer.checkpoint.read import Snapshot, restore, set_weights
from tandem.trainer.config import Data, RunConfig
from tandem.trainer.data import remote
from tandem.trainer.data.ledger import Ledger, copy_manifests
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import TOKENIZER_FILE
from tandem.trainer.disk import write_whole
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.models import param_groups
from tandem.trainer.models.init import values
from tandem.trainer.models.mup import rules

log = logging.getLogger(__name__)


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


def open_ledger(folder: Path, loader: Loader) -> Ledger:
    """The run folder's ledger, and beside it copies of the manifests that it needs to be read, and the tokenizer."""
    copy_manifests(folder, loader.manifests)
    return Ledger(folder)


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


def keep_tokenizer(folder: Path, data: Data) -> None:
    """The run folder holds the tokenizer of the corpora: with it, exports need nothing but the run."""
    address = remote.below(next(iter(data.sources.values())), TOKENIZER_FILE)
    try:
        content = remote.content(address, data.cache)
    except OSError as error:
        log.warning("%s: cannot be read (%s); the run trains without it, its exports have no tokenizer", address, error)
    else:
        write_whole(folder / TOKENIZER_FILE, content)


def check_held_out(config: RunConfig, loader: Loader) -> None:
    """Raises UserError when validation would need more held-out tokens than there are, before a step is made."""
    for phase in config.schedule.phases if config.evaluate.every_steps else []:
        loader.validation(phase, config.evaluate.tokens)
