"""From what a run begins: which weights and which checkpoint may go on under a config, and which may not.

The one idea: a run keeps its model, its corpora and its past; what lies ahead may change.
"""

import logging
from collections.abc import Collection

from tandem.trainer.checkpoint.read import Snapshot
from tandem.trainer.checkpoint.write import model_facts
from tandem.trainer.config import RunConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import check_resume

log = logging.getLogger(__name__)


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
