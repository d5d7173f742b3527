"""The table of the parametrization: initial values, learning rate, decay and forward scales by role and width multiplier m.

`models.init`, `models.param_groups` and the forward passes read it, and no other file knows about muP. With `mup: null` the
standard parametrization applies: m is 1 and attention is scaled by 1 / sqrt(head_dim).

Source: Cerebras modelzoo, `convert_config_to_mup.py` and the BTLM configs (hidden matrices: std / sqrt(m), learning rate / m;
residual outputs also / sqrt(2 * depth); logits * output_multiplier / m; attention 1 / head_dim, or 1 / sqrt(head_dim) without
`scale_qk_dot_by_d`). Stable LM 2 uses the same depth rule with m = 1. muP: Yang et al. 2022, arXiv 2203.03466, table 8.
"""

from dataclasses import dataclass
from math import sqrt

from tandem.trainer.config import AnyModelConfig, MupConfig


@dataclass(frozen=True)
class ParameterRule:
    """Initial values and optimizer settings of the parameters with one role."""

    init_std: float
    """Standard deviation of the initial normal; 0 if the parameters start at `init_value`."""
    init_value: float
    lr_scale: float
    """Factor on the schedule's learning rate."""
    has_weight_decay: bool


@dataclass(frozen=True)
class ForwardScales:
    embedding: float
    logits: float
    attention: float


def width_multiplier(model: AnyModelConfig, mup: MupConfig | None) -> float:
    """Return model.hidden_size relative to the width at which the hyperparameters were tuned; 1 without muP."""
    return model.hidden_size / mup.base_hidden_size if mup else 1.0


def parameter_rules(model: AnyModelConfig, mup: MupConfig | None) -> dict[str, ParameterRule]:
    """Return the rule of each role. The layers set the role of each parameter (`distributed.layers`)."""
    multiplier = width_multiplier(model, mup)
    hidden_std = model.init_std / sqrt(multiplier)
    return {
        "embedding": ParameterRule(model.init_std, 0.0, 1.0, True),
        "head": ParameterRule(model.init_std, 0.0, 1.0, True),
        "hidden": ParameterRule(hidden_std, 0.0, 1.0 / multiplier, True),
        "residual_output": ParameterRule(hidden_std / sqrt(2 * model.num_layers), 0.0, 1.0 / multiplier, True),
        "norm": ParameterRule(0.0, 1.0, 1.0, False),
        "bias": ParameterRule(0.0, 0.0, 1.0, False),
    }


def forward_scales(model: AnyModelConfig, mup: MupConfig | None) -> ForwardScales:
    """Return the factors on the embedding's output, the logits and the query-key product."""
    attention_scale = 1.0 / model.head_dim if mup and mup.scale_qk_dot_by_d else 1.0 / sqrt(model.head_dim)
    if mup is None:
        return ForwardScales(1.0, 1.0, attention_scale)
    logits_scale = mup.output_multiplier / width_multiplier(model, mup)
    return ForwardScales(mup.embedding_multiplier, logits_scale, attention_scale)
