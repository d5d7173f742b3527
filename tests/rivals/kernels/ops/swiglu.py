"""Rivals of SwiGLU, alone and with the matrix product that follows."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tandem.kernels.bench.ops import OPERATIONS, Example, Function, leaf
from tandem.kernels.bench.shapes import Shape
from tests.rivals.kernels.operation import ContestedOperation, Rival, own_rivals
from tests.rivals.kernels.ops.compiled import compiled_rival
from tests.rivals.kernels.shapes import LIGER_FEED_FORWARD_SHAPES


def _liger(shape: Shape) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.unbind(1))


def _liger_separate(shape: Shape) -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _make_separate_example(shape: Shape) -> Example:
    gate, up = (leaf(shape, shape.tokens, shape.ffn_hidden_size) for _ in range(2))
    return Example((gate, up), (torch.randn(shape.tokens, shape.ffn_hidden_size, dtype=shape.dtype),))


def _liger_fused(shape: Shape) -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(1))


def _megatron(shape: Shape) -> Function:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return lambda gate_up: bias_swiglu_impl(gate_up.flatten(1), None)


def _flash(shape: Shape) -> Function:
    from flash_attn.ops.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.unbind(1))


def _with_linear(rival: Rival) -> Rival:
    def make_function(shape: Shape) -> Function:
        activation = rival.make_function(shape)
        return lambda gate_up, weight: F.linear(activation(gate_up), weight)

    return Rival(rival.name, make_function, rival.needs_gpu)


_OURS, _TORCH = own_rivals(OPERATIONS["swiglu"])
_OURS_LINEAR, _TORCH_LINEAR = own_rivals(OPERATIONS["swiglu_linear"])
_LIGER_FUSED = Rival("liger fused buffer", _liger_fused)

SWIGLU = ContestedOperation(
    OPERATIONS["swiglu"],
    shapes=LIGER_FEED_FORWARD_SHAPES,
    rivals=[
        _OURS,
        _TORCH,
        compiled_rival(OPERATIONS["swiglu"].plain),
        Rival("liger", _liger),
        Rival(
            "liger, halves apart",
            _liger_separate,
            deviation="two tensors of other values, as no projection leaves them",
            make_example=_make_separate_example,
        ),
        _LIGER_FUSED,
        Rival("megatron", _megatron, is_slow_to_compile=True),
        Rival("flash-attn", _flash),
    ],
)
SWIGLU_LINEAR = ContestedOperation(
    OPERATIONS["swiglu_linear"],
    shapes=LIGER_FEED_FORWARD_SHAPES,
    rivals=[
        _OURS_LINEAR,
        _with_linear(replace(_OURS, name="ours, product kept")),
        _TORCH_LINEAR,
        compiled_rival(OPERATIONS["swiglu_linear"].plain),
        _with_linear(_LIGER_FUSED),
    ],
)
