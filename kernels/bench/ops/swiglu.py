"""SwiGLU, alone and before the product with the matrix that follows, on one buffer of [tokens, 2, ffn]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import Example, Function, Operation, Precision, Rival, Work, compiled, leaf, values
from tandem.kernels.bench.shapes import LIGER_FEED_FORWARD, SMALL_MODELS, FeedForward, feed_forward


def _example(shape: FeedForward, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    gate_up = leaf((shape.tokens, 2, shape.ffn), device, dtype, generator)
    return Example((gate_up,), (values((shape.tokens, shape.ffn), device, dtype, generator),))


def _forward(shape: FeedForward, element_bytes: int) -> Work:
    """Two halves in, one out."""
    return Work(3 * shape.tokens * shape.ffn * element_bytes)


def _backward(shape: FeedForward, element_bytes: int) -> Work:
    """Two halves and a gradient in, two gradients out."""
    return Work(5 * shape.tokens * shape.ffn * element_bytes)


def _linear_example(
    shape: FeedForward, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    gate_up = leaf((shape.tokens, 2, shape.ffn), device, dtype, generator)
    weight = leaf((shape.width, shape.ffn), device, dtype, generator, shape.ffn**-0.5)
    return Example((gate_up, weight), (values((shape.tokens, shape.width), device, dtype, generator),))


def _linear_forward(shape: FeedForward, element_bytes: int) -> Work:
    """Two halves and a weight in, the product out."""
    tokens, ffn, width = shape.tokens, shape.ffn, shape.width
    flops = 2 * tokens * ffn * width
    return Work((2 * tokens * ffn + ffn * width + tokens * width) * element_bytes, flops, flops)


def _linear_backward(shape: FeedForward, element_bytes: int) -> Work:
    """Two halves, a weight and a gradient in, gradients of halves and weight out: two products."""
    tokens, ffn, width = shape.tokens, shape.ffn, shape.width
    flops = 4 * tokens * ffn * width
    return Work((4 * tokens * ffn + 2 * ffn * width + tokens * width) * element_bytes, flops, flops)


def _ours(shape: FeedForward) -> Function:
    from tandem.kernels.swiglu import swiglu

    return swiglu


def _ours_linear(shape: FeedForward) -> Function:
    from tandem.kernels.swiglu import swiglu_linear

    return swiglu_linear


def _torch(gate_up: Tensor) -> Tensor:
    return F.silu(gate_up[:, 0]) * gate_up[:, 1]


def _liger(shape: FeedForward) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.unbind(1))


def _liger_apart(shape: FeedForward) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _apart(shape: FeedForward, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Example:
    gate, up = (leaf((shape.tokens, shape.ffn), device, dtype, generator) for _ in range(2))
    return Example((gate, up), (values((shape.tokens, shape.ffn), device, dtype, generator),))


def _liger_fused(shape: FeedForward) -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(1))


def _megatron(shape: FeedForward) -> Function:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return lambda gate_up: bias_swiglu_impl(gate_up.flatten(1), None)


def _flash(shape: FeedForward) -> Function:
    from flash_attn.ops.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.unbind(1))


def _then_linear(rival: Rival) -> Rival:
    def function(shape: FeedForward) -> Function:
        activation: Any = rival.function(shape)
        return lambda gate_up, weight: F.linear(activation(gate_up), weight)

    return Rival(rival.name, function, rival.gpu)


def _launches(shape: FeedForward) -> None:
    from tandem.kernels.device import swiglu

    gate_up = torch.empty(shape.tokens, 2, shape.ffn, dtype=shape.dtype, device="meta")
    out = swiglu.forward(gate_up, 0)
    swiglu.backward(out, gate_up, 0, with_product=False)


def _linear_launches(shape: FeedForward) -> None:
    from tandem.kernels.device import swiglu

    gate_up = torch.empty(shape.tokens, 2, shape.ffn, dtype=shape.dtype, device="meta")
    swiglu.backward(swiglu.forward(gate_up, 0), gate_up, 0, with_product=True)


TORCH = Rival("torch", lambda shape: _torch, gpu=False)
COMPILED = Rival("torch.compile", lambda shape: compiled(_torch), compiles=True)
LIGER_FUSED = Rival("liger fused buffer", _liger_fused)

SWIGLU = Operation(
    name="swiglu",
    ceiling="copy",
    shapes=[*feed_forward(tp_sizes=(1,)), *LIGER_FEED_FORWARD],
    more_shapes=feed_forward(tp_sizes=(2, 4)) + feed_forward(SMALL_MODELS),
    example=_example,
    forward=_forward,
    backward=_backward,
    rivals=[
        Rival("ours", _ours, gpu=False),
        TORCH,
        COMPILED,
        Rival("liger", _liger),
        Rival(
            "liger, halves apart",
            _liger_apart,
            other="two tensors of other values, as no projection leaves them",
            example=_apart,
        ),
        LIGER_FUSED,
        Rival("megatron", _megatron, compiles=True),
        Rival("flash-attn", _flash),
    ],
    launches=_launches,
    precision=Precision(("out", "d gate_up"), _ours, lambda shape: _torch),
)

SWIGLU_LINEAR = Operation(
    name="swiglu_linear",
    ceiling="matmul",
    shapes=[*feed_forward(tp_sizes=(1,)), *LIGER_FEED_FORWARD],
    more_shapes=feed_forward(tp_sizes=(2, 4)) + feed_forward(SMALL_MODELS),
    example=_linear_example,
    forward=_linear_forward,
    backward=_linear_backward,
    rivals=[
        Rival("ours", _ours_linear, gpu=False),
        _then_linear(Rival("ours, product kept", _ours, gpu=False)),
        _then_linear(TORCH),
        Rival(
            "torch.compile",
            lambda shape: compiled(lambda gate_up, weight: F.linear(_torch(gate_up), weight)),
            compiles=True,
        ),
        _then_linear(LIGER_FUSED),
    ],
    launches=_linear_launches,
    precision=Precision(("out", "d gate_up", "d weight"), _ours_linear, _then_linear(TORCH).function),
)
