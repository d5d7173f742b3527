"""LayerNorm of the residual stream."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def layer_norm(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None,
    epsilon: float,
) -> Float[Tensor, "*batch width"]:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, biased variance; fp32 inside, x's dtype out.

    Source: Ba et al. 2016, arXiv 1607.06450, equation 4.
    Note: torch 2.13 sums the gradients of weight and bias in bf16 on the CPU, which over 4,096 positions is 7 % off; so there
    the whole runs in fp32. On CUDA its kernel sums in fp32.
    """
    inside = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    bias = None if bias is None else bias.to(inside)
    return F.layer_norm(x.to(inside), x.shape[-1:], weight.to(inside), bias, epsilon).to(x.dtype)
