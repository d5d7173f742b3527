"""The gated activation of the feed-forward network, alone and with the matrix product that follows.

    forward   y  = silu(g) * u                      silu(g) = g * s,  s = sigmoid(g)
    backward  dg = dy * u * s * (1 + g * (1 - s)),  du = dy * silu(g)

It is one operation so that backward keeps only the input: with autograd alone, bf16 training would keep three fp32 copies of
the model's widest activation. The next matrix product would also keep y. `swiglu_linear` computes y again in backward instead,
in the pass that reads g and u anyway.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tandem.kernels.device.shared import upcast


def swiglu(
    gate_up: Float[Tensor, "*batch 2 ffn_hidden_size"], *, gate_index: int = 0
) -> Float[Tensor, "*batch ffn_hidden_size"]:
    """Return silu(gate) * up, gate at `gate_index`, up at the other index; fp32 inside (fp64 for fp64), the input's dtype out.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2, without biases.
    """
    return torch.ops.tandem.swiglu(gate_up, gate_index)


def swiglu_linear(
    gate_up: Float[Tensor, "*batch 2 ffn_hidden_size"],
    weight: Float[Tensor, "hidden_size ffn_hidden_size"],
    *,
    gate_index: int = 0,
) -> Float[Tensor, "*batch hidden_size"]:
    """Return swiglu(gate_up) times the transposed weight; keep only these two for backward."""
    return torch.ops.tandem.swiglu_linear(gate_up, weight, gate_index)


@torch.library.custom_op("tandem::swiglu", mutates_args=(), device_types="cpu")
def _swiglu(gate_up: Tensor, gate: int) -> Tensor:
    wide = upcast(gate_up)
    g, u = wide.select(-2, gate), wide.select(-2, 1 - gate)
    return (g * g.sigmoid() * u).to(gate_up.dtype).contiguous()


@_swiglu.register_kernel("cuda")
def _(gate_up: Tensor, gate: int) -> Tensor:
    from tandem.kernels.device import swiglu as device

    return device.forward(gate_up, gate)


@_swiglu.register_fake
def _(gate_up: Tensor, gate: int) -> Tensor:
    return gate_up.new_empty(_output_shape(gate_up))


@torch.library.custom_op("tandem::swiglu_backward", mutates_args=(), device_types="cpu")
def _swiglu_backward(out_gradient: Tensor, gate_up: Tensor, gate: int, with_product: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate_up, and the forward result if `with_product`, else an empty tensor."""
    wide, dy = upcast(gate_up), upcast(out_gradient)
    g, u = wide.select(-2, gate), wide.select(-2, 1 - gate)
    sigmoid = g.sigmoid()
    halves = [dy * u * sigmoid * (1 + g * (1 - sigmoid)), dy * g * sigmoid]
    gradient = torch.stack(halves if gate == 0 else halves[::-1], dim=-2).to(gate_up.dtype)
    product = (g * sigmoid * u).to(gate_up.dtype) if with_product else gate_up.new_empty(0)
    return gradient.contiguous(), product.contiguous()


@_swiglu_backward.register_kernel("cuda")
def _(out_gradient: Tensor, gate_up: Tensor, gate: int, with_product: bool) -> tuple[Tensor, Tensor]:
    from tandem.kernels.device import swiglu as device

    return device.backward(out_gradient, gate_up, gate, with_product=with_product)


@_swiglu_backward.register_fake
def _(out_gradient: Tensor, gate_up: Tensor, gate: int, with_product: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(_output_shape(gate_up) if with_product else (0,))


def _swiglu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.gate = inputs
    ctx.save_for_backward(gate_up)


def _swiglu_autograd_backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, None]:
    (gate_up,) = ctx.saved_tensors
    gradient, _ = torch.ops.tandem.swiglu_backward(out_gradient, gate_up, ctx.gate, False)
    return gradient, None


_swiglu.register_autograd(_swiglu_autograd_backward, setup_context=_swiglu_setup_context)


@torch.library.custom_op("tandem::swiglu_linear", mutates_args=())
def _swiglu_linear(gate_up: Tensor, weight: Tensor, gate: int) -> Tensor:
    return torch.nn.functional.linear(torch.ops.tandem.swiglu(gate_up, gate), weight)


@_swiglu_linear.register_fake
def _(gate_up: Tensor, weight: Tensor, gate: int) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-2], len(weight)))


def _swiglu_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, weight, ctx.gate = inputs
    ctx.save_for_backward(gate_up, weight)


def _swiglu_linear_autograd_backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    gate_up, weight = ctx.saved_tensors
    product_gradient = out_gradient @ weight
    gradient, product = torch.ops.tandem.swiglu_backward(product_gradient, gate_up, ctx.gate, True)
    return gradient, out_gradient.reshape(-1, len(weight)).t() @ product.reshape(-1, weight.shape[1]), None


_swiglu_linear.register_autograd(_swiglu_linear_autograd_backward, setup_context=_swiglu_linear_setup_context)


def _output_shape(gate_up: Tensor) -> torch.Size:
    return gate_up.shape[:-2] + gate_up.shape[-1:]
