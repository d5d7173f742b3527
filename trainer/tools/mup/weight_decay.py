"""The weight-decay check: what one update does to a weight, against the law, at every width.

AdamW's decay is decoupled but multiplied by the group's learning rate, so a hidden matrix, whose rate falls as 1/width, decays
that much more slowly than the embedding; norms and biases do not decay. It must be measured by itself: over the few updates of
a coordinate check it moves nothing that could be seen. A first update with a gradient shows the learning rate itself, and with
it two faults that activations hide: rates of norms and biases, and a rate that is too small beside the embedding's.

Source: the grouping of Cerebras modelzoo; that coordinates do not show decay: microsoft/mup, pull request 73.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.config import TrainConfig, UserError
from tandem.trainer.data.loader import unpack_batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import role_of
from tandem.trainer.distributed.mesh import Mesh, to_device
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.proxies import build_loader, proxy_config, require_mup
from tandem.trainer.train import forward_backward

LR_EXPONENTS = {"hidden": -1, "residual_output": -1, "embedding": 0, "head": 0, "norm": 0, "bias": 0}
"""Role -> exponent of the width multiplier in its learning rate."""
DECAYED_ROLES = ("hidden", "residual_output", "embedding", "head")
"""Roles whose weights an update shrinks by lr * weight_decay, the learning rate being theirs."""

RELATIVE_TOLERANCE = 1e-3
"""Relative; a weight of 1 that changes by a hundredth does so with an fp32 rounding error of 1e-5 of the change."""

CHECK_LR = 0.01
"""Learning rate at which a role's movement is measured: large enough to show beside weights of 1, whatever the config's."""

CHECK_DECAY = 0.1
"""Share of a weight that the decay check's update takes where the law has no factor: the learning rate is chosen for it."""


def require_weight_decay(config: TrainConfig) -> None:
    """Raises UserError for a config that has no decay."""
    if not config.optim.weight_decay:
        raise UserError("optim.weight_decay: 0; there is no decay to check; set it, or leave decay out of --checks")


def measure(config: TrainConfig, widths: list[int], mesh: Mesh) -> list[Measurement]:
    """Each role's learning rate and decay over their law: 1, or 0 for the decay of what must not decay."""
    rates, decays = [], []
    for width in widths:
        found, multiplier = (
            proxy_config(config, width, tp_size=mesh.tp_size),
            width / require_mup(config).base_hidden_size,
        )
        for role, movements_of_role in max_movement_by_role(found, mesh).items():
            unit = CHECK_LR * multiplier ** LR_EXPONENTS[role]
            rates.append(_build_measurement("learning rate", role, width, movements_of_role, unit, 1.0))
        for role, decay_fractions in decay_by_role(found, mesh).items():
            unit = CHECK_DECAY * multiplier ** LR_EXPONENTS[role]
            decays.append(_build_measurement("decay", role, width, decay_fractions, unit, float(role in DECAYED_ROLES)))
    return rates + decays


def max_movement_by_role(config: TrainConfig, mesh: Mesh) -> dict[str, list[float]]:
    """Role -> of each of its tensors, the farthest that the first update at `CHECK_LR` moves a weight, decay aside.

    Source: with one gradient behind it, Adam's quotient of moments is the gradient's sign.
    """
    config = replace(config, optim=replace(config.optim, weight_decay=0.0))
    engine, batch = build_engine(config, mesh, None), next(build_loader(config).batches(0, None))
    before = {fragment.name: fragment.master.clone() for fragment in engine.optimizer_fragments()}
    forward_backward(engine, batch, config.schedule.phases[0].micro_batch_size, mesh)
    engine.update(CHECK_LR)
    return _group_by_role(engine, lambda name, master: float((master - before[name]).abs().max()))


def decay_by_role(config: TrainConfig, mesh: Mesh) -> dict[str, list[float]]:
    """Role -> of each of its tensors, the share of a weight that an update without gradients takes."""
    engine, batch = build_engine(config, mesh, None), next(build_loader(config).batches(0, None))
    rows = to_device(batch.packed[:, : config.schedule.phases[0].micro_batch_size], mesh)
    losses = engine(*unpack_batch(rows))
    engine.backward(0.0 * torch.mean(losses), is_last=True)
    for fragment in engine.optimizer_fragments():
        fragment.master.fill_(1.0)
    engine.update(CHECK_DECAY / config.optim.weight_decay)
    return _group_by_role(engine, lambda name, master: 1.0 - float(master.min()))


def _group_by_role(engine: Engine, measure_tensor: Callable[[str, Tensor], float]) -> dict[str, list[float]]:
    """Role -> what a function of name and master weights gives for each of its tensors."""
    parameters, found = dict(engine.model.named_parameters()), dict[str, list[float]]()
    for fragment in engine.optimizer_fragments():
        found.setdefault(role_of(parameters[fragment.name]), []).append(measure_tensor(fragment.name, fragment.master))
    return {role: found[role] for role in LR_EXPONENTS if role in found}


def _build_measurement(
    quantity: str, role: str, width: int, values: list[float], expected_unit: float, expected: float
) -> Measurement:
    """Of the tensor that is farthest from the law."""
    worst = max((value / expected_unit for value in values), key=lambda value: abs(value - expected))
    low, high = expected - RELATIVE_TOLERANCE, expected + RELATIVE_TOLERANCE
    return Measurement(
        "decay", f"{quantity} of {role}", f"width {width}", worst, low, high, f"the {quantity} of role {role}"
    )
