"""Parameter roles to AdamW's parameter groups: one group for each (decay, learning-rate factor) that occurs."""

from typing import Any

import torch
from torch import nn

from tandem.trainer.config import Optim
from tandem.trainer.distributed.layers import role_of
from tandem.trainer.models.mup import Rule


def groups(model: nn.Module, table: dict[str, Rule], section: Optim) -> list[dict[str, Any]]:
    """AdamW groups with two keys of ours: `name`, for people, and `lr_scale`, the factor on the schedule's learning rate."""
    found: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        rule = table[role_of(parameter)]
        key = (rule.decays, rule.lr_scale)
        if key not in found:
            found[key] = {
                "name": f"{'decay' if rule.decays else 'no_decay'}_lr_x{rule.lr_scale:g}",
                "lr_scale": rule.lr_scale,
                "weight_decay": section.weight_decay if rule.decays else 0.0,
                "params": [],
            }
        found[key]["params"].append(parameter)
    return list(found.values())


def adamw(parameter_groups: list[dict[str, Any]], section: Optim, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the groups; its learning rate is set before every update, so it starts at 0."""
    return torch.optim.AdamW(
        parameter_groups,
        lr=0.0,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=device.type == "cuda",
    )
