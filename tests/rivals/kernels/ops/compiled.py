"""torch.compile as a rival."""

from collections.abc import Callable
from typing import Any

import torch

from tandem.kernels.bench.ops import Function
from tests.rivals.kernels.operation import Rival


def compiled_rival(make_function: Callable[[Any], Function]) -> Rival:
    """The function compiled for one shape."""

    def make_compiled(shape: Any) -> Function:
        return torch.compile(make_function(shape), dynamic=False, fullgraph=True)

    return Rival("torch.compile", make_compiled, is_slow_to_compile=True)
