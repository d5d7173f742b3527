"""AdamW and its parameter groups: one group for each combination of weight decay and learning-rate factor."""

from typing import Any

import torch
from torch import nn

from tandem.trainer.config import OptimConfig
from tandem.trainer.distributed.layers import role_of
from tandem.trainer.models.mup import ParameterRule


def build_param_groups(model: nn.Module, rules: dict[str, ParameterRule], config: OptimConfig) -> list[dict[str, Any]]:
    """Build AdamW groups. Their extra keys are `name` and `lr_scale`, the factor on the schedule's learning rate."""
    groups_by_key: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        rule = rules[role_of(parameter)]
        name = f"{'decay' if rule.has_weight_decay else 'no_decay'}_lr_x{rule.lr_scale:g}"
        weight_decay = config.weight_decay if rule.has_weight_decay else 0.0
        new_group = {"name": name, "lr_scale": rule.lr_scale, "weight_decay": weight_decay, "params": []}
        group = groups_by_key.setdefault((rule.has_weight_decay, rule.lr_scale), new_group)
        group["params"].append(parameter)
    return list(groups_by_key.values())


def build_adamw(param_groups: list[dict[str, Any]], config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """Build AdamW over the groups. Its learning rate is 0 here and is set before every update."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(param_groups, lr=0.0, betas=betas, eps=config.eps, fused=device.type == "cuda")
