"""Rotary positions: the angles by which `split_and_rotate_qkv` rotates the leading dims of each head, in the half-split layout.

Dim i of the first half and dim i of the second half of the rotated part form a pair, which is rotated by
position * base^(-2i / rotary_dims).
"""

import torch
from jaxtyping import Float32, Int
from torch import Tensor


def rotary_table(
    positions: Int[Tensor, "rows seq"], rotary_dims: int, base: float
) -> tuple[Float32[Tensor, "rows seq rotary_half"], Float32[Tensor, "rows seq rotary_half"]]:
    """Return cosine and sine of every pair's angle. Positions of one row serve all rows of a batch.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    Note: angles are computed in fp64. In fp32 those of position 32,768 would be off by up to 1e-3.
    """
    exponent = torch.arange(0, rotary_dims, 2, dtype=torch.float64, device=positions.device) / rotary_dims
    angles = positions.unsqueeze(-1) * base**-exponent
    return angles.cos().float(), angles.sin().float()
