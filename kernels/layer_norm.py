"""LayerNorm of the residual stream."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def layer_norm(
    x: Float[Tensor, "*batch hidden_size"],
    weight: Float[Tensor, " hidden_size"],
    bias: Float[Tensor, " hidden_size"] | None,
    eps: float,
) -> Float[Tensor, "*batch hidden_size"]:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias with biased variance; fp32 inside, x's dtype out.

    Source: Ba et al. 2016, arXiv 1607.06450, equation 4.
    Note: on a CPU, torch 2.13 sums the gradients of weight and bias in bf16, which is 7 % off over 4,096 positions. There
    everything runs in fp32. On CUDA torch's kernel sums in fp32.
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    bias = None if bias is None else bias.to(compute_dtype)
    return F.layer_norm(x.to(compute_dtype), x.shape[-1:], weight.to(compute_dtype), bias, eps).to(x.dtype)
