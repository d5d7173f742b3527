"""Initial values, drawn at the true global shape from (seed, name) and then sliced, so that no parallel layout changes them."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.models.mup import Rule
from trainer.parallel.layers import role_of, shard_of
from trainer.parallel.mesh import Mesh
from trainer.parallel.shards import local_part


@torch.no_grad()
def fill(model: nn.Module, table: dict[str, Rule], *, seed: int, truncation_sigmas: float, mesh: Mesh) -> None:
    """Every parameter holds its rank's part of its initial value; padding is zero."""
    value = values(model, table, seed=seed, truncation_sigmas=truncation_sigmas)
    for name, parameter in model.named_parameters():
        place(parameter, value(name), mesh)


def values(model: nn.Module, table: dict[str, Rule], *, seed: int, truncation_sigmas: float) -> Callable[[str], Tensor]:
    """Name of a parameter -> its global initial value in fp32, drawn when asked for."""
    marks = {name: (shard_of(parameter).shape, role_of(parameter)) for name, parameter in model.named_parameters()}

    def value(name: str) -> Tensor:
        shape, role = marks[name]
        return initial(name, shape, table[role], seed=seed, truncation_sigmas=truncation_sigmas)

    return value


@torch.no_grad()
def place(parameter: nn.Parameter, full: Tensor, mesh: Mesh) -> None:
    """The parameter holds its rank's part of the true global tensor, zeros in the padding."""
    part = local_part(shard_of(parameter), full, mesh.tp_rank, mesh.tp_size)
    parameter.copy_(part.reshape(parameter.shape))


def initial(name: str, shape: tuple[int, ...], rule: Rule, *, seed: int, truncation_sigmas: float) -> Tensor:
    """The global initial value in fp32: a function of its arguments and nothing else.

    Note: the normal is cut at +-truncation_sigmas and not rescaled, so its realised deviation is smaller than the rule's
    (0.88 of it at 2 sigma), as in the published BTLM run.
    """
    if not rule.init_std:
        return torch.full(shape, rule.init_value)
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    full = torch.empty(shape)
    if not truncation_sigmas:
        return full.normal_(0.0, rule.init_std, generator=generator)
    bound = truncation_sigmas * rule.init_std
    return nn.init.trunc_normal_(full, 0.0, rule.init_std, -bound, bound, generator=generator)
