"""The YAML of a run, read once, checked whole and never written back; runtime facts live in `parallel.mesh.Mesh`.

`sections` says what there is, `strict` and `rules` what is allowed, `file` reads and writes it. Only the standard library and
omegaconf are imported, so that commands which merely look at a config answer at once.
"""

from trainer.config.file import dump, load
from trainer.config.rules import RANKS_WAIT_SECONDS, check, check_alibi_scaling, check_world
from trainer.config.sections import (
    BTLM,
    FAMILIES,
    LEARNING_RATES,
    PADDING_MULTIPLE,
    AlibiScaling,
    Cache,
    Checkpoint,
    Cosine,
    Data,
    Debug,
    Evaluate,
    Hardware,
    Hybrid,
    LearningRate,
    Linear,
    Log,
    Model,
    Mup,
    Optim,
    Parallel,
    Phase,
    Run,
    RunConfig,
    Schedule,
    StableLM,
    UserError,
)
from trainer.config.strict import section_from

__all__ = [
    "BTLM",
    "FAMILIES",
    "LEARNING_RATES",
    "PADDING_MULTIPLE",
    "RANKS_WAIT_SECONDS",
    "AlibiScaling",
    "Cache",
    "Checkpoint",
    "Cosine",
    "Data",
    "Debug",
    "Evaluate",
    "Hardware",
    "Hybrid",
    "LearningRate",
    "Linear",
    "Log",
    "Model",
    "Mup",
    "Optim",
    "Parallel",
    "Phase",
    "Run",
    "RunConfig",
    "Schedule",
    "StableLM",
    "UserError",
    "check",
    "check_alibi_scaling",
    "check_world",
    "dump",
    "load",
    "section_from",
]
