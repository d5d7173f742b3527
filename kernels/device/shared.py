"""What an operation and its kernel agree on. It needs no Triton, for operations run where there is none."""

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
"""The maximum of no columns. Not minus infinity, whose difference from itself is no number."""


def like(x: Tensor) -> Tensor:
    """Room for such a tensor with tokens outermost in memory, as the residual stream has them: heads join without a copy."""
    rows, seq, heads, head_dim = x.shape
    return x.new_empty((seq, rows, heads, head_dim)).transpose(0, 1)
