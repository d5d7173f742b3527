"""Initial values, drawn at the true global shape from (seed, name) and then sliced, so that no parallel layout changes them."""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.layers import role_of, sharding_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import slice_local
from tandem.trainer.models.mup import ParameterRule

CHUNK_ELEMENTS = 1 << 19
"""Pieces have generators of their own, so that threads draw several at a time; another size gives other values."""
MAX_SERIAL_ELEMENTS = (1 << 15) - 1
"""Torch starts threads of its own for more; then each of ours would have a team."""
MIN_NORMAL_ELEMENTS = 16
"""Torch draws fewer by another method, in the arithmetic of the C library."""
MAX_THREADS = 8
"""Of one rank; a node has several."""


def initial_values(
    model: nn.Module, rules: dict[str, ParameterRule], *, seed: int, truncation_sigmas: float
) -> Callable[[str], Tensor]:
    """Name of a parameter -> its global initial value in fp32, drawn when asked for."""
    shapes_and_roles = {
        name: (sharding_of(parameter).global_shape, role_of(parameter)) for name, parameter in model.named_parameters()
    }

    def value(name: str) -> Tensor:
        shape, role = shapes_and_roles[name]
        return initial_value(name, shape, rules[role], seed=seed, truncation_sigmas=truncation_sigmas)

    return value


@torch.no_grad()
def load_parameter(parameter: nn.Parameter, global_tensor: Tensor, mesh: Mesh) -> None:
    """The parameter holds its rank's part of the true global tensor, zeros in the padding."""
    local_tensor = slice_local(sharding_of(parameter), global_tensor, mesh.tp_rank, mesh.tp_size)
    parameter.copy_(local_tensor.reshape(parameter.shape))


def initial_value(
    name: str, shape: tuple[int, ...], rule: ParameterRule, *, seed: int, truncation_sigmas: float
) -> Tensor:
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
    start = first_chunk_seed(seed, name)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        futures = [
            threads.submit(_fill_truncated_normal, piece, rule.init_std, bound, start + index)
            for index, piece in enumerate(full.view(-1).split(CHUNK_ELEMENTS))
        ]
    for piece in futures:
        piece.result()
    return full


def first_chunk_seed(seed: int, name: str) -> int:
    """Of the generator of a tensor's first piece; the others follow, one by one."""
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _fill_truncated_normal(chunk: Tensor, std: float, bound: float, seed: int) -> None:
    """`chunk` holds the generator's normals; those outside of +-bound are drawn again until none is."""
    generator = torch.Generator().manual_seed(seed)
    _fill_normal(chunk, std, generator)
    if bound == math.inf:
        return
    parts = enumerate(chunk.split(MAX_SERIAL_ELEMENTS))
    outside = torch.cat(
        [(part.abs() > bound).nonzero().view(-1) + index * MAX_SERIAL_ELEMENTS for index, part in parts]
    )
    while len(outside):
        redrawn = _fill_normal(torch.empty(len(outside)), std, generator)
        chunk[outside] = redrawn
        outside = outside[redrawn.abs() > bound]


def _fill_normal(target: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if len(target) >= MIN_NORMAL_ELEMENTS:
        return target.normal_(0.0, std, generator=generator)
    return target.copy_(torch.empty(MIN_NORMAL_ELEMENTS).normal_(0.0, std, generator=generator)[: len(target)])
