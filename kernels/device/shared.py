"""Shared by operations and their kernels. Does not import Triton, because operations run without it."""

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
"""The maximum of no columns. Not minus infinity, because its difference from itself is NaN."""


def like(x: Tensor) -> Tensor:
    """Return an empty tensor like x with tokens outermost in memory, as in the residual stream: heads join without a copy."""
    rows, seq, heads, head_dim = x.shape
    return x.new_empty((seq, rows, heads, head_dim)).transpose(0, 1)


def upcast(x: Tensor) -> Tensor:
    """Convert to fp32, the dtype of the arithmetic; keep fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
