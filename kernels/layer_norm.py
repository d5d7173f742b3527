"""LayerNorm over each head's own dims, without bias."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def head_norm(
    x: Float[Tensor, "rows seq heads head_dim"], weight: Float[Tensor, "heads head_dim"], epsilon: float
) -> Float[Tensor, "rows seq heads head_dim"]:
    """(x - mean) / sqrt(variance + epsilon) * weight per head, biased variance; fp32 inside, x's dtype out.

    Source: query and key norms of Stable LM 2; each head has a weight vector of its own.
    """
    inside = torch.promote_types(x.dtype, torch.float32)
    normal = F.layer_norm(x.to(inside), x.shape[-1:], eps=epsilon)
    return (normal * weight.to(inside)).to(x.dtype)
