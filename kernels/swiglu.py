"""The gated activation of the feed-forward network.

    forward   y  = silu(g) * u                      silu(g) = g * s,  s = sigmoid(g)
    backward  dg = dy * u * s * (1 + g * (1 - s)),  du = dy * silu(g)

Written as one operation so that backward keeps nothing but the input: left to autograd, bf16 training would
keep three fp32 copies of the widest activation of the model.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def swiglu(gate_up: Float[Tensor, "... 2 ffn_width"]) -> Float[Tensor, "... ffn_width"]:
    """silu(gate) * up; index 0 is the gate, 1 is up. fp32 inside (fp64 for fp64), the input's dtype out.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2, without biases.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = _wide(gate_up).unbind(-2)
        return (gate * gate.sigmoid() * up).to(gate_up.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (gate, up), gradient = _wide(gate_up).unbind(-2), _wide(output_gradient)
        sigmoid = gate.sigmoid()
        gate_gradient = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
        up_gradient = gradient * gate * sigmoid
        return torch.stack((gate_gradient, up_gradient), dim=-2).to(gate_up.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
