"""The weight-decay check: compare the effect of one update on a weight with the law, at every width.

AdamW multiplies its decoupled decay by the group's learning rate. A hidden matrix, whose learning rate falls as 1/width,
therefore decays more slowly than the embedding by the same factor. Norms and biases do not decay. Coordinates cannot show this,
because decay has no visible effect within a few updates. The first update with a gradient shows the learning rate itself, and
two faults that activations hide: wrong rates of norms and biases, and a rate that is too small compared with the embedding's.

Source: the grouping of Cerebras modelzoo; that coordinates do not show decay: microsoft/mup, pull request 73.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tandem.trainer.config import TrainConfig
from tandem.trainer.data.loader import Batch, unpack_batch
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import role_of
from tandem.trainer.distributed.mesh import Mesh, to_device
from tandem.trainer.startup import build_engine
from tandem.trainer.tools.mup.measurement import Measurement
from tandem.trainer.tools.mup.proxies import proxy_config, require_mup
from tandem.trainer.tools.mup.training import build_loader
from tandem.trainer.train import forward_backward

LR_EXPONENTS = {"hidden": -1, "residual_output": -1, "embedding": 0, "head": 0, "norm": 0, "bias": 0}
"""Role -> exponent of the width multiplier in its learning rate."""
DECAYED_ROLES = ("hidden", "residual_output", "embedding", "head")
"""Roles whose weights an update shrinks by their learning rate * weight_decay."""
RELATIVE_TOLERANCE = 1e-3
"""fp32 rounding is 1e-5 of the change if a weight of 1 changes by a hundredth."""
CHECK_LR = 0.01
"""Learning rate at which movement is measured instead of the config's. It is large enough to show in weights of 1."""
CHECK_DECAY = 0.1
"""Share of a weight that the update of the decay check removes from the embedding. The learning rate is chosen accordingly."""


def measure(config: TrainConfig, widths: list[int], mesh: Mesh) -> list[Measurement]:
    """Divide each role's learning rate and decay by their law: 1 is expected, and 0 for roles that must not decay."""
    rates, decays = [], []
    for width in widths:
        proxy = proxy_config(config, width, tp_size=mesh.tp_size)
        multiplier = width / require_mup(config).base_hidden_size
        for role, movements in max_movement_by_role(proxy, mesh).items():
            unit = CHECK_LR * multiplier ** LR_EXPONENTS[role]
            rates.append(_compare("learning rate", role, width, movements, unit, 1.0))
        for role, decay_fractions in decay_by_role(proxy, mesh).items():
            unit = CHECK_DECAY * multiplier ** LR_EXPONENTS[role]
            decays.append(_compare("decay", role, width, decay_fractions, unit, float(role in DECAYED_ROLES)))
    return rates + decays


def max_movement_by_role(config: TrainConfig, mesh: Mesh) -> dict[str, list[float]]:
    """Role -> for each of its tensors, the largest change of a weight in a first update at `CHECK_LR` without decay.

    After a single gradient, Adam's quotient of moments is the gradient's sign.
    """
    engine, batch = _build_proxy(replace(config, optim=replace(config.optim, weight_decay=0.0)), mesh)
    before = {fragment.name: fragment.master.clone() for fragment in engine.optimizer_fragments()}
    forward_backward(engine, batch, config.schedule.phases[0].micro_batch_size, mesh)
    engine.update(CHECK_LR)
    return _group_by_role(engine, lambda name, master: float((master - before[name]).abs().max()))


def decay_by_role(config: TrainConfig, mesh: Mesh) -> dict[str, list[float]]:
    """Role -> for each of its tensors, the share of a weight that an update without gradients removes."""
    engine, batch = _build_proxy(config, mesh)
    rows = to_device(batch.packed[:, : config.schedule.phases[0].micro_batch_size], mesh)
    engine.backward(0.0 * torch.mean(engine(*unpack_batch(rows))), is_last=True)
    for fragment in engine.optimizer_fragments():
        fragment.master.fill_(1.0)
    engine.update(CHECK_DECAY / config.optim.weight_decay)
    return _group_by_role(engine, lambda name, master: 1.0 - float(master.min()))


def _build_proxy(config: TrainConfig, mesh: Mesh) -> tuple[Engine, Batch]:
    return build_engine(config, mesh, None), next(build_loader(config).batches(0, None))


def _group_by_role(engine: Engine, measure_tensor: Callable[[str, Tensor], float]) -> dict[str, list[float]]:
    """Role -> the result of `measure_tensor(name, master weights)` for each of its tensors."""
    parameters, found = dict(engine.model.named_parameters()), dict[str, list[float]]()
    for fragment in engine.optimizer_fragments():
        found.setdefault(role_of(parameters[fragment.name]), []).append(measure_tensor(fragment.name, fragment.master))
    return {role: found[role] for role in LR_EXPONENTS if role in found}


def _compare(quantity: str, role: str, width: int, values: list[float], unit: float, expected: float) -> Measurement:
    """Report the tensor that is farthest from the law."""
    worst = max((value / unit for value in values), key=lambda value: (math.isnan(value), abs(value - expected)))
    low, high, name = expected - RELATIVE_TOLERANCE, expected + RELATIVE_TOLERANCE, f"{quantity} of {role}"
    return Measurement("decay", name, f"width {width}", worst, low, high, f"the {quantity} of role {role}")
