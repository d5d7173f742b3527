"""From what a run begins: which weights and which checkpoint may go on under a config, and which may not.

The one idea: a run keeps its model, its corpora and its past; what lies ahead may change.
"""

import logging
from collections.abc import Collection

from tandem.trainer.checkpoint.read import Checkpoint
from tandem.trainer.checkpoint.write import model_metadata
from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.loader import Loader
from tandem.trainer.data.manifest import check_fingerprints

log = logging.getLogger(__name__)


def check_resumable(config: TrainConfig, checkpoint: Checkpoint, loader: Loader) -> None:
    """Raises UserError unless the checkpoint is of this model and these corpora."""
    remedy = "a run keeps its model; restore the value or choose another run.name"
    check_same_model(config, checkpoint, f"checkpoint {checkpoint.folder}", remedy)
    check_fingerprints(checkpoint.manifest["fingerprints"], loader.fingerprints)
    check_past_phases(Timeline(config.schedule), checkpoint)
    for field, saved in checkpoint.manifest["shuffle_settings"].items():
        if loader.shuffle_settings[field] != saved:
            raise UserError(
                f"{field}: {loader.shuffle_settings[field]} but the run was saved with {saved}; it fixes the "
                f"order of the data; "
                "restore the value or choose another run.name"
            )


def check_past_phases(timeline: Timeline, checkpoint: Checkpoint) -> None:
    """Raises UserError when the schedule gives the steps already made another shape; what lies ahead may change.

    Of a phase that the run is in, it says which two phases let the rest of it change.
    """
    first_step = 0
    for index, saved_phase in enumerate(checkpoint.manifest["phases"]):
        if first_step >= checkpoint.step:
            return
        end_step = first_step + saved_phase["tokens"] // (saved_phase["global_batch_size"] * saved_phase["seq_len"])
        key = f"schedule.phases[{index}]"
        if index >= len(timeline.phase_spans):
            raise UserError(f"{key}: missing; the run has made steps of phase {saved_phase['name']!r}; restore it")
        span = timeline.phase_spans[index]
        changed = [
            name
            for name in ("seq_len", "global_batch_size", "mixture")
            if getattr(span.phase, name) != saved_phase[name]
        ]
        if min(span.end_step, checkpoint.step) != min(end_step, checkpoint.step):
            changed.append("tokens")
        if changed:
            remedy = "restore the value or choose another run.name"
            if checkpoint.step < end_step:
                done_tokens = (checkpoint.step - first_step) * saved_phase["global_batch_size"] * saved_phase["seq_len"]
                remaining_tokens = (
                    max(1, round((span.phase.tokens - done_tokens) / span.phase.tokens_per_step))
                    * span.phase.tokens_per_step
                )
                remedy = (
                    f"to change the rest of it write two phases, {saved_phase['name']!r} as it was with tokens: "
                    f"{done_tokens}, and after "
                    f"it one of another name with tokens: {remaining_tokens}"
                )
            raise UserError(
                f"{key}.{changed[0]}: {getattr(span.phase, changed[0])} but the run made its steps with "
                f"{saved_phase[changed[0]]}; the past of a run is fixed; {remedy}"
            )
        first_step = end_step


def check_same_model(
    config: TrainConfig,
    checkpoint: Checkpoint,
    checkpoint_label: str,
    remedy: str,
    *,
    ignored_fields: Collection[str] = (),
) -> None:
    """Raises UserError for the first field of model or mup, but the `ignored_fields` ones, that differs from the saved one."""
    saved, requested = checkpoint.manifest, model_metadata(config.model, config.mup)
    for section in ("model", "mup"):
        requested_fields, saved_fields = requested[section] or {}, saved[section] or {}
        for name in sorted((requested_fields.keys() | saved_fields.keys()) - set(ignored_fields)):
            if requested_fields.get(name) != saved_fields.get(name):
                raise UserError(
                    f"{section}.{name}: {requested_fields.get(name)} but the {checkpoint_label} has "
                    f"{saved_fields.get(name)}; {remedy}"
                )
