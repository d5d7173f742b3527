"""Rotary positions on the leading dims of each head, in the half-split layout.

Dim i of the first half and dim i of the second half of the rotated part form a pair that turns by
position * base^(-2i / rotary_dims); the dims after the rotated part pass unchanged.
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor


def positions(documents: Int[Tensor, "rows seq"]) -> Int[Tensor, "rows seq"]:
    """Distance of each token from its document's first in the row; a document is a run of one index."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rotary_table(
    positions: Int[Tensor, "rows seq"], rotary_dims: int, base: float
) -> tuple[Float32[Tensor, "rows seq rotary_half"], Float32[Tensor, "rows seq rotary_half"]]:
    """Cosine and sine of every pair's angle; one row serves all rows of `rotate`.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    Note: angles are formed in fp64; in fp32 those of position 32,768 would be off by up to 1e-3.
    """
    exponent = torch.arange(0, rotary_dims, 2, dtype=torch.float64, device=positions.device) / rotary_dims
    angles = positions.unsqueeze(-1) * base**-exponent
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[Tensor, "rows seq heads head_dim"],
    cos: Float[Tensor, "#rows seq rotary_half"],
    sin: Float[Tensor, "#rows seq rotary_half"],
) -> Float[Tensor, "rows seq heads head_dim"]:
    """The first 2 * rotary_half dims of every head rotated, the rest as it was; fp32 inside, x's dtype."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary_half = cos.shape[-1]
    first, second, rest = x.tensor_split((rotary_half, 2 * rotary_half), dim=-1)
    rotated_first = (first * cos - second * sin).to(x.dtype)
    rotated_second = (second * cos + first * sin).to(x.dtype)
    return torch.cat((rotated_first, rotated_second, rest), dim=-1)
