"""Initial values, drawn at the true global shape from (seed, name) and then sliced, so that no parallel layout changes them."""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.layers import role_of, shard_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import local_part
from tandem.trainer.models.mup import Rule

PIECE_ELEMENTS = 1 << 19
"""Pieces have generators of their own, so that threads draw several at a time; another size gives other values."""
SERIAL_ELEMENTS = (1 << 15) - 1
"""Torch starts threads of its own for more; then each of ours would have a team."""
FEWEST = 16
"""Torch draws fewer by another method, in the arithmetic of the C library."""
MAX_THREADS = 8
"""Of one rank; a node has several."""


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
    Note: the bits are those of x86 processors with AVX2 or AVX-512. On others torch's `normal_` takes logarithm and cosine
    from elsewhere: values differ in their last bits, and one near the bound may be drawn again on one of the two only.
    """
    if not rule.init_std:
        return torch.full(shape, rule.init_value)
    full = torch.empty(shape)
    bound = truncation_sigmas * rule.init_std if truncation_sigmas else math.inf
    start = first_seed(seed, name)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        drawn = [
            threads.submit(_draw, piece, rule.init_std, bound, start + index)
            for index, piece in enumerate(full.view(-1).split(PIECE_ELEMENTS))
        ]
    for piece in drawn:
        piece.result()
    return full


def first_seed(seed: int, name: str) -> int:
    """Of the generator of a tensor's first piece; the others follow, one by one."""
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _draw(piece: Tensor, std: float, bound: float, seed: int) -> None:
    """`piece` holds the generator's normals; those outside of +-bound are drawn again until none is."""
    generator = torch.Generator().manual_seed(seed)
    _draw_normal(piece, std, generator)
    if bound == math.inf:
        return
    parts = enumerate(piece.split(SERIAL_ELEMENTS))
    outside = torch.cat([(part.abs() > bound).nonzero().view(-1) + index * SERIAL_ELEMENTS for index, part in parts])
    while len(outside):
        again = _draw_normal(torch.empty(len(outside)), std, generator)
        piece[outside] = again
        outside = outside[again.abs() > bound]


def _draw_normal(target: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if len(target) >= FEWEST:
        return target.normal_(0.0, std, generator=generator)
    return target.copy_(torch.empty(FEWEST).normal_(0.0, std, generator=generator)[: len(target)])
