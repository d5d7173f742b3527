"""Check whether a config may resume from a checkpoint or start from its weights.

A run's model, corpora and past steps are fixed. The rest of its schedule may change. Torch is not imported here.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from tandem.trainer.checkpoint.layout import MANIFEST_FILE, SavedCheckpoint, list_committed, model_metadata
from tandem.trainer.config import DataConfig, TrainConfig, UserError
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.data.manifest import TOKENIZER_FILE, CorpusManifest, check_fingerprints, check_tokenizer

REMEDY = "restore the value or choose another run.name"
CHANGEABLE_MODEL_FIELDS = ("init_std", "init_truncation_sigmas", "document_masking", "alibi_scaling")
"""Fields of the model that may differ from those of the checkpoint in `run.init_from`."""


def check_resumable(
    config: TrainConfig,
    checkpoint: SavedCheckpoint,
    fingerprints: Mapping[str, str],
    shuffle_settings: Mapping[str, int],
) -> None:
    """Raises: UserError if the model, a corpus, the data order, or the schedule of past steps differs from the checkpoint's."""
    check_same_model(config, checkpoint, f"checkpoint {checkpoint.folder}", f"a run cannot change its model; {REMEDY}")
    check_fingerprints(checkpoint.manifest["fingerprints"], fingerprints)
    check_past_phases(Timeline(config.schedule), checkpoint)
    for field, saved in checkpoint.manifest["shuffle_settings"].items():
        if shuffle_settings[field] != saved:
            raise UserError(
                f"{field}: {shuffle_settings[field]} differs from {saved}, with which the run was saved; this field "
                f"determines the order of the data; {REMEDY}"
            )


def check_saved_model(config: TrainConfig, config_file: Path, checkpoint: SavedCheckpoint) -> None:
    """Raises: UserError if the config of a run folder, read from `config_file`, has another model than its checkpoint.

    No start writes such a config, so one of the two files was changed, or comes from another run.
    """
    label = str(checkpoint.folder / MANIFEST_FILE)
    try:
        check_same_model(config, checkpoint, label, "both must describe one run; restore config.yaml")
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from None


def check_run_folder_model(config: TrainConfig, folder: Path) -> None:
    """Do `check_saved_model` with the newest checkpoint of a run folder whose manifest can be read, if there is one."""
    for checkpoint_folder in reversed(list_committed(folder / "checkpoints")):
        checkpoint = None
        with suppress(OSError, UserError):  # damaged, or removed by the run meanwhile
            checkpoint = SavedCheckpoint(checkpoint_folder)
        if checkpoint:
            check_saved_model(config, folder / "config.yaml", checkpoint)
            return


def check_past_phases(timeline: Timeline, checkpoint: SavedCheckpoint) -> None:
    """Raises: UserError if the schedule changes steps that the run has already completed.

    If the changed phase is still running, the message names the two phases to write instead, so that only the rest of
    that phase changes.
    """
    first_step = 0
    for index, saved in enumerate(checkpoint.manifest["phases"]):
        if first_step >= checkpoint.step:
            return
        tokens_per_step = saved["global_batch_size"] * saved["seq_len"]
        end_step = first_step + saved["tokens"] // tokens_per_step
        key = f"schedule.phases[{index}]"
        if index >= len(timeline.phase_spans):
            raise UserError(
                f"{key}: is missing, but the run has already trained in phase {saved['name']!r}; restore the phase"
            )
        span = timeline.phase_spans[index]
        phase = span.phase
        changed = [name for name in ("seq_len", "global_batch_size", "mixture") if getattr(phase, name) != saved[name]]
        if min(span.end_step, checkpoint.step) != min(end_step, checkpoint.step):
            changed.append("tokens")
        if changed:
            remedy = REMEDY
            if checkpoint.step < end_step:
                done_tokens = (checkpoint.step - first_step) * tokens_per_step
                remaining_steps = max(1, round((phase.tokens - done_tokens) / phase.tokens_per_step))
                remedy = (
                    f"to change only the remaining steps, write two phases, {saved['name']!r} as before but with tokens: "
                    f"{done_tokens}, then a phase with another name and tokens: {remaining_steps * phase.tokens_per_step}"
                )
            raise UserError(
                f"{key}.{changed[0]}: {getattr(phase, changed[0])} differs from {saved[changed[0]]}, the value in the steps "
                f"that the run has completed; past steps cannot change; {remedy}"
            )
        first_step = end_step


def check_same_model(
    config: TrainConfig, checkpoint: SavedCheckpoint, label: str, remedy: str, *, ignored_fields: Collection[str] = ()
) -> None:
    """Raises: UserError for the first field of model or mup that differs from the saved one, except `ignored_fields`."""
    requested, stored = model_metadata(config.model, config.mup), model_metadata(*checkpoint.model_configs())
    for section in ("model", "mup"):
        now, saved = requested[section] or {}, stored[section] or {}
        for name in sorted((now.keys() | saved.keys()) - set(ignored_fields)):
            if now.get(name) != saved.get(name):
                raise UserError(
                    f"{section}.{name}: {now.get(name)} differs from {saved.get(name)} in {label}; {remedy}"
                )


def check_initial_model(config: TrainConfig, checkpoint: SavedCheckpoint) -> None:
    """Raises: UserError if a field of model or mup differs from the checkpoint in `run.init_from`, and may not."""
    remedy = "use the value that the weights were trained with, or choose other weights"
    label = f"run.init_from {checkpoint.folder}"
    check_same_model(config, checkpoint, label, remedy, ignored_fields=CHANGEABLE_MODEL_FIELDS)


def check_initial_tokenizer(
    checkpoint: SavedCheckpoint, data: DataConfig, manifests: Mapping[str, CorpusManifest]
) -> bool:
    """Return whether the corpora have the tokenizer that the checkpoint was trained with; False if that is not known.

    Raises: UserError if they were prepared with another tokenizer.
    """
    tokenizer = checkpoint.run_folder / TOKENIZER_FILE
    if not manifests or not tokenizer.is_file():
        return False
    source, corpus = next(iter(manifests.items()))  # the sources of a run share one tokenizer
    remedy = (
        "prepare the corpora with the tokenizer of the weights, or set run.init_from_tokenizer=any if the weights are to learn "
        "another tokenizer"
    )
    check_tokenizer(tokenizer, corpus, "run.init_from", remedy, corpus_folder=data.sources[source])
    return True
