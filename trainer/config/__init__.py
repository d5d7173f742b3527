"""The config of a run: one YAML file, read once and checked completely. Facts about the launch are in `distributed.mesh.Mesh`.

`sections` defines the fields, `constraints` their ranges, `parsing` checks keys, types and ranges, `rules` checks what concerns
several fields, and `loading` reads and writes the file,
with `yaml_file` and `overrides`.
The package imports only the standard library and omegaconf, so that commands that just read a config start fast.
"""

from tandem.trainer.config.constraints import Pattern, Range, SelectedBy
from tandem.trainer.config.loading import dump_config, load_config, load_saved_config
from tandem.trainer.config.parsing import parse_content, parse_dataclass
from tandem.trainer.config.rules import RANK_WAIT_TIMEOUT_SECONDS, check_alibi_scaling, check_config, check_world_size

from tandem.trainer.config.sections import (  # isort: skip
    LR_CONFIGS, MODEL_CONFIGS, AlibiScalingConfig, AnyModelConfig, BTLMConfig, CheckpointConfig, CosineLRConfig,
    DataConfig, DebugConfig, EvaluateConfig, GuardConfig, HardwareConfig, HybridLRConfig, LinearLRConfig, LogConfig,
    LRConfig, ModelConfig, MupConfig, OptimConfig, ParallelConfig, PhaseConfig, RunConfig, ScheduleConfig,
    ShardCacheConfig, StableLMConfig, TrainConfig, UserError, WatchdogConfig,
)  # fmt: skip

__all__ = [
    "LR_CONFIGS", "MODEL_CONFIGS", "RANK_WAIT_TIMEOUT_SECONDS", "AlibiScalingConfig", "AnyModelConfig", "BTLMConfig",
    "CheckpointConfig", "CosineLRConfig", "DataConfig", "DebugConfig", "EvaluateConfig", "GuardConfig",
    "HardwareConfig", "HybridLRConfig", "LRConfig", "LinearLRConfig", "LogConfig", "ModelConfig", "MupConfig",
    "OptimConfig", "ParallelConfig", "Pattern", "PhaseConfig", "Range", "RunConfig", "ScheduleConfig", "SelectedBy",
    "ShardCacheConfig", "StableLMConfig", "TrainConfig", "UserError", "WatchdogConfig", "check_alibi_scaling",
    "check_config", "check_world_size", "dump_config", "load_config", "load_saved_config", "parse_content", "parse_dataclass",
]  # fmt: skip
