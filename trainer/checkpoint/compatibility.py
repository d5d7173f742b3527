"""From what a run begins: which weights and which checkpoint may go on under a config, and which may not.

The one idea: a run keeps its model, its corpora and its past; what lies ahead may change.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from tandem.trainer.checkpoint.read import Snapshot, opened
from tandem.trainer.checkpoint.write import model_facts
from tandem.trainer.config import RunConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import check_resume
from tandem.trainer.distributed.mesh import Mesh

log = logging.getLogger(__name__)
NOT_OF_THE_WEIGHTS = ("init_std", "init_truncation_sigmas", "document_masking", "alibi_scaling")
"""Fields of the model that whoever trains given weights further may set anew."""
WARNED_OF = ("document_masking", "alibi_scaling")
"""Those of them with which the weights compute something else."""


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


def check_continues(config: RunConfig, snapshot: Snapshot, loader: Loader) -> None:
    """Raises UserError unless the snapshot is of this model and these corpora."""
    remedy = "a run keeps its model; restore the value or choose another run.name"
    check_same_model(config, snapshot, f"checkpoint {snapshot.folder}", remedy)
    check_resume(snapshot.manifest["fingerprints"], loader.fingerprints)
    check_same_past(Timeline(config.schedule), snapshot)
    for field, saved in snapshot.manifest["order"].items():
        if loader.order[field] != saved:
            raise UserError(
                f"{field}: {loader.order[field]} but the run was saved with {saved}; it fixes the order of the data; "
                "restore the value or choose another run.name"
            )


def check_same_past(timeline: Timeline, snapshot: Snapshot) -> None:
    """Raises UserError when the schedule gives the steps already made another shape; what lies ahead may change.

    Of a phase that the run is in, it says which two phases let the rest of it change.
    """
    first_step = 0
    for index, saved in enumerate(snapshot.manifest["phases"]):
        if first_step >= snapshot.step:
            return
        end_step = first_step + saved["tokens"] // (saved["rows"] * saved["seq_len"])
        where = f"schedule.phases[{index}]"
        if index >= len(timeline.spans):
            raise UserError(f"{where}: missing; the run has made steps of phase {saved['name']!r}; restore it")
        span = timeline.spans[index]
        changed = [name for name in ("seq_len", "rows", "mixture") if getattr(span.phase, name) != saved[name]]
        if min(span.end_step, snapshot.step) != min(end_step, snapshot.step):
            changed.append("tokens")
        if changed:
            remedy = "restore the value or choose another run.name"
            if snapshot.step < end_step:
                done = (snapshot.step - first_step) * saved["rows"] * saved["seq_len"]
                rest = max(1, round((span.phase.tokens - done) / span.phase.batch_tokens)) * span.phase.batch_tokens
                remedy = (
                    f"to change the rest of it write two phases, {saved['name']!r} as it was with tokens: {done}, and after "
                    f"it one of another name with tokens: {rest}"
                )
            raise UserError(
                f"{where}.{changed[0]}: {getattr(span.phase, changed[0])} but the run made its steps with "
                f"{saved[changed[0]]}; the past of a run is fixed; {remedy}"
            )
        first_step = end_step


def check_same_model(
    config: RunConfig, snapshot: Snapshot, where: str, remedy: str, *, free: Collection[str] = ()
) -> None:
    """Raises UserError for the first field of model or mup, but the `free` ones, that differs from the saved one."""
    saved, asked = snapshot.manifest, model_facts(config.model, config.mup)
    for section in ("model", "mup"):
        ours, theirs = asked[section] or {}, saved[section] or {}
        for name in sorted((ours.keys() | theirs.keys()) - set(free)):
            if ours.get(name) != theirs.get(name):
                raise UserError(f"{section}.{name}: {ours.get(name)} but the {where} has {theirs.get(name)}; {remedy}")
