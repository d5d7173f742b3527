"""Parameter roles to AdamW's parameter groups: one group for each (decay, learning-rate factor) that occurs."""

from typing import Any

import torch
from torch import nn

from tandem.trainer.config import OptimConfig
from tandem.trainer.distributed.layers import role_of
from tandem.trainer.models.mup import ParameterRule


def build_param_groups(model: nn.Module, rules: dict[str, ParameterRule], config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups with two keys of ours: `name`, for people, and `lr_scale`, the factor on the schedule's learning rate."""
    groups_by_key: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        rule = rules[role_of(parameter)]
        key = (rule.has_weight_decay, rule.lr_scale)
        if key not in groups_by_key:
            groups_by_key[key] = {
                "name": f"{'decay' if rule.has_weight_decay else 'no_decay'}_lr_x{rule.lr_scale:g}",
                "lr_scale": rule.lr_scale,
                "weight_decay": config.weight_decay if rule.has_weight_decay else 0.0,
                "params": [],
            }
        groups_by_key[key]["params"].append(parameter)
    return list(groups_by_key.values())


def build_adamw(param_groups: list[dict[str, Any]], config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the groups; its learning rate is set before every update, so it starts at 0."""
    return torch.optim.AdamW(
        param_groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type == "cuda",
    )
