"""Initial values. Each is drawn at its global shape from (seed, name), then sliced, so it is the same in every layout."""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.layers import role_of, sharding_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import slice_local
from tandem.trainer.models.mup import ParameterRule
from tandem.trainer.runtime.processors import usable_processors

CHUNK_ELEMENTS = 1 << 19
"""Each chunk has its own generator, so that threads can draw in parallel. Another size gives other values."""
MAX_SERIAL_ELEMENTS = (1 << 15) - 1
"""Above this, torch starts its own threads, and each of our threads would start several."""
MIN_NORMAL_ELEMENTS = 16
"""For fewer values, torch uses another method, whose results depend on the C library."""
MAX_THREADS = 8
"""Threads per rank; a node has several ranks."""


def initial_values(
    model: nn.Module, rules: dict[str, ParameterRule], *, seed: int, truncation_sigmas: float
) -> Callable[[str], Tensor]:
    """Return a function from a parameter's name to its global initial value in fp32, which is drawn when called."""
    shapes_and_roles = {
        name: (sharding_of(parameter).global_shape, role_of(parameter)) for name, parameter in model.named_parameters()
    }

    def value(name: str) -> Tensor:
        shape, role = shapes_and_roles[name]
        return initial_value(name, shape, rules[role], seed=seed, truncation_sigmas=truncation_sigmas)

    return value


@torch.no_grad()
def load_parameter(parameter: nn.Parameter, global_tensor: Tensor, mesh: Mesh) -> None:
    """Copy this rank's part of the global tensor into the parameter, with zeros in the padding."""
    local_tensor = slice_local(sharding_of(parameter), global_tensor, mesh.tp_rank, mesh.tp_size)
    parameter.copy_(local_tensor.reshape(parameter.shape))


def initial_value(
    name: str, shape: tuple[int, ...], rule: ParameterRule, *, seed: int, truncation_sigmas: float
) -> Tensor:
    """Draw the global initial value in fp32, which depends only on the arguments.

    Note: The normal is truncated at +-truncation_sigmas and not rescaled, so its standard deviation is smaller than the rule's
    (0.88 of it at 2 sigma), as in the published BTLM run.
    Note: The bits are those of x86 processors with AVX2 or AVX-512. On others, torch's `normal_` computes logarithm and cosine
    differently. Values then differ in their last bits, and a value near the bound may be redrawn on only one of two machines.
    """
    if not rule.init_std:
        return torch.full(shape, rule.init_value)
    full = torch.empty(shape)
    bound = truncation_sigmas * rule.init_std if truncation_sigmas else math.inf
    chunks, chunk_seeds = full.view(-1).split(CHUNK_ELEMENTS), count(first_chunk_seed(seed, name))
    with ThreadPoolExecutor(min(MAX_THREADS, usable_processors())) as threads:
        list(threads.map(_fill_truncated_normal, chunks, repeat(rule.init_std), repeat(bound), chunk_seeds))
    return full


def first_chunk_seed(seed: int, name: str) -> int:
    """Return the seed of a tensor's first chunk. The seeds of the following chunks count up from it."""
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _fill_truncated_normal(chunk: Tensor, std: float, bound: float, seed: int) -> None:
    """Fill the chunk with normal values, and redraw those outside +-bound until none is left."""
    generator = torch.Generator().manual_seed(seed)
    _fill_normal(chunk, std, generator)
    if bound == math.inf:
        return
    parts = enumerate(chunk.split(MAX_SERIAL_ELEMENTS))
    found = [(part.abs() > bound).nonzero().view(-1) + index * MAX_SERIAL_ELEMENTS for index, part in parts]
    outside = torch.cat(found)
    while len(outside):
        redrawn = _fill_normal(torch.empty(len(outside)), std, generator)
        chunk[outside] = redrawn
        outside = outside[redrawn.abs() > bound]


def _fill_normal(target: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if len(target) >= MIN_NORMAL_ELEMENTS:
        return target.normal_(0.0, std, generator=generator)
    return target.copy_(torch.empty(MIN_NORMAL_ELEMENTS).normal_(0.0, std, generator=generator)[: len(target)])
