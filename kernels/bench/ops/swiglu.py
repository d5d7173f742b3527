"""SwiGLU, alone and before the product with the matrix that follows, on one buffer of [tokens, 2, ffn]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.kernels.bench.operation import (
    Example,
    Function,
    Operation,
    Precision,
    Rival,
    Work,
    compile_function,
    random_leaf,
    random_tensor,
)
from tandem.kernels.bench.shapes import LIGER_FEED_FORWARD_SHAPES, SMALL_MODELS, FeedForwardShape, feed_forward_shapes


def _make_example(
    shape: FeedForwardShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    gate_up = random_leaf((shape.tokens, 2, shape.ffn_hidden_size), device, dtype, generator)
    return Example((gate_up,), (random_tensor((shape.tokens, shape.ffn_hidden_size), device, dtype, generator),))


def _forward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Two halves in, one out."""
    return Work(3 * shape.tokens * shape.ffn_hidden_size * element_bytes)


def _backward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Two halves and a gradient in, two gradients out."""
    return Work(5 * shape.tokens * shape.ffn_hidden_size * element_bytes)


def _make_linear_example(
    shape: FeedForwardShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    gate_up = random_leaf((shape.tokens, 2, shape.ffn_hidden_size), device, dtype, generator)
    weight = random_leaf(
        (shape.hidden_size, shape.ffn_hidden_size), device, dtype, generator, shape.ffn_hidden_size**-0.5
    )
    return Example((gate_up, weight), (random_tensor((shape.tokens, shape.hidden_size), device, dtype, generator),))


def _linear_forward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Two halves and a weight in, the product out."""
    tokens, ffn, width = shape.tokens, shape.ffn_hidden_size, shape.hidden_size
    flops = 2 * tokens * ffn * width
    return Work((2 * tokens * ffn + ffn * width + tokens * width) * element_bytes, flops, flops)


def _linear_backward_work(shape: FeedForwardShape, element_bytes: int) -> Work:
    """Two halves, a weight and a gradient in, gradients of halves and weight out: two products."""
    tokens, ffn, width = shape.tokens, shape.ffn_hidden_size, shape.hidden_size
    flops = 4 * tokens * ffn * width
    return Work((4 * tokens * ffn + 2 * ffn * width + tokens * width) * element_bytes, flops, flops)


def _ours(shape: FeedForwardShape) -> Function:
    from tandem.kernels.swiglu import swiglu

    return swiglu


def _ours_linear(shape: FeedForwardShape) -> Function:
    from tandem.kernels.swiglu import swiglu_linear

    return swiglu_linear


def _torch(gate_up: Tensor) -> Tensor:
    return F.silu(gate_up[:, 0]) * gate_up[:, 1]


def _liger(shape: FeedForwardShape) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.unbind(1))


def _liger_separate(shape: FeedForwardShape) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _make_separate_example(
    shape: FeedForwardShape, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Example:
    gate, up = (random_leaf((shape.tokens, shape.ffn_hidden_size), device, dtype, generator) for _ in range(2))
    return Example((gate, up), (random_tensor((shape.tokens, shape.ffn_hidden_size), device, dtype, generator),))


def _liger_fused(shape: FeedForwardShape) -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(1))


def _megatron(shape: FeedForwardShape) -> Function:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return lambda gate_up: bias_swiglu_impl(gate_up.flatten(1), None)


def _flash(shape: FeedForwardShape) -> Function:
    from flash_attn.ops.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.unbind(1))


def _with_linear(rival: Rival) -> Rival:
    def function(shape: FeedForwardShape) -> Function:
        activation: Any = rival.make_function(shape)
        return lambda gate_up, weight: F.linear(activation(gate_up), weight)

    return Rival(rival.name, function, rival.needs_gpu)


def _launch_kernels(shape: FeedForwardShape) -> None:
    from tandem.kernels.device import swiglu

    gate_up = torch.empty(shape.tokens, 2, shape.ffn_hidden_size, dtype=shape.dtype, device="meta")
    out = swiglu.forward(gate_up, 0)
    swiglu.backward(out, gate_up, 0, with_product=False)


def _launch_linear_kernels(shape: FeedForwardShape) -> None:
    from tandem.kernels.device import swiglu

    gate_up = torch.empty(shape.tokens, 2, shape.ffn_hidden_size, dtype=shape.dtype, device="meta")
    swiglu.backward(swiglu.forward(gate_up, 0), gate_up, 0, with_product=True)


TORCH_RIVAL = Rival("torch", lambda shape: _torch, needs_gpu=False)
COMPILED_RIVAL = Rival("torch.compile", lambda shape: compile_function(_torch), is_slow_to_compile=True)
LIGER_FUSED_RIVAL = Rival("liger fused buffer", _liger_fused)

SWIGLU = Operation(
    name="swiglu",
    ceiling="copy",
    shapes=[*feed_forward_shapes(tp_sizes=(1,)), *LIGER_FEED_FORWARD_SHAPES],
    extra_shapes=feed_forward_shapes(tp_sizes=(2, 4)) + feed_forward_shapes(SMALL_MODELS),
    make_example=_make_example,
    forward_work=_forward_work,
    backward_work=_backward_work,
    rivals=[
        Rival("ours", _ours, needs_gpu=False),
        TORCH_RIVAL,
        COMPILED_RIVAL,
        Rival("liger", _liger),
        Rival(
            "liger, halves apart",
            _liger_separate,
            deviation="two tensors of other values, as no projection leaves them",
            make_example=_make_separate_example,
        ),
        LIGER_FUSED_RIVAL,
        Rival("megatron", _megatron, is_slow_to_compile=True),
        Rival("flash-attn", _flash),
    ],
    launch_kernels=_launch_kernels,
    precision=Precision(("out", "d gate_up"), _ours, lambda shape: _torch),
)

SWIGLU_LINEAR = Operation(
    name="swiglu_linear",
    ceiling="matmul",
    shapes=[*feed_forward_shapes(tp_sizes=(1,)), *LIGER_FEED_FORWARD_SHAPES],
    extra_shapes=feed_forward_shapes(tp_sizes=(2, 4)) + feed_forward_shapes(SMALL_MODELS),
    make_example=_make_linear_example,
    forward_work=_linear_forward_work,
    backward_work=_linear_backward_work,
    rivals=[
        Rival("ours", _ours_linear, needs_gpu=False),
        _with_linear(Rival("ours, product kept", _ours, needs_gpu=False)),
        _with_linear(TORCH_RIVAL),
        Rival(
            "torch.compile",
            lambda shape: compile_function(lambda gate_up, weight: F.linear(_torch(gate_up), weight)),
            is_slow_to_compile=True,
        ),
        _with_linear(LIGER_FUSED_RIVAL),
    ],
    launch_kernels=_launch_linear_kernels,
    precision=Precision(("out", "d gate_up", "d weight"), _ours_linear, _with_linear(TORCH_RIVAL).make_function),
)
