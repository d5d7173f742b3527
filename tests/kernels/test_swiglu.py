"""SwiGLU against its definition in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tandem.kernels.swiglu import swiglu, swiglu_linear

SHAPES = [(2, 1), (3, 2, 7), (2, 5, 2, 33)]
ONE_ROUNDING = {"rtol": 0.51 * torch.finfo(torch.bfloat16).eps, "atol": 0}
"""Half a unit in the last place, and a little for the fp32 arithmetic."""


def definition(gate_up: torch.Tensor, gate: int = 0) -> torch.Tensor:
    halves = gate_up.double().unbind(-2)
    return halves[gate] / (1 + torch.exp(-halves[gate])) * halves[1 - gate]


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_the_definition_in_double(shape, gate, generator):
    gate_up = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(gate_up, gate_index=gate), definition(gate_up, gate))
    assert torch.autograd.gradcheck(lambda x: swiglu(x, gate_index=gate), gate_up)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_result_is_the_fp64_result_rounded_once(shape, generator):
    gate_up = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    output_gradient = torch.randn(shape[:-2] + shape[-1:], generator=generator).bfloat16()
    exact = definition(gate_up)
    (gradient,) = torch.autograd.grad(swiglu(gate_up), gate_up, output_gradient)
    (exact_gradient,) = torch.autograd.grad(exact, gate_up, output_gradient.double())
    torch.testing.assert_close(swiglu(gate_up).double(), exact, **ONE_ROUNDING)
    torch.testing.assert_close(gradient.double(), exact_gradient.double(), **ONE_ROUNDING)


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_with_a_matrix_has_the_bits_of_the_two_operations(dtype, gate, generator):
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((3, 5, 2, 24), (7, 24))]
    output_gradient = torch.randn(3, 5, 7, generator=generator).to(dtype)
    together = swiglu_linear(*leaves, gate_index=gate)
    apart = F.linear(swiglu(leaves[0], gate_index=gate), leaves[1])
    pairs = [torch.autograd.grad(result, leaves, output_gradient) for result in (together, apart)]
    assert torch.equal(together, apart)
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


def test_gradients_of_the_product_with_a_matrix_are_exact_in_double(generator):
    shapes = ((3, 2, 5), (4, 5))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(swiglu_linear, leaves)


def test_backward_keeps_the_input_alone_and_of_the_product_the_matrix_besides(generator):
    gate_up = torch.randn(4, 2, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(3, 8, generator=generator).bfloat16().requires_grad_()
    for operation, inputs in ((swiglu, (gate_up,)), (swiglu_linear, (gate_up, weight))):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            operation(*inputs)
        assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in inputs]


def test_large_gates_neither_overflow_nor_vanish_wrongly():
    gate_up = torch.tensor([[-200.0, -20.0, 20.0, 200.0], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    output = swiglu(gate_up)
    torch.testing.assert_close(output.double(), definition(gate_up))
    output.sum().backward()
    assert gate_up.grad.isfinite().all()


def test_inputs_are_unchanged_and_the_bits_repeat(generator):
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 2, 5), (4, 5))]
    before = [leaf.detach().clone() for leaf in leaves]
    first, second = (torch.autograd.grad(swiglu_linear(*leaves).sum(), leaves) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))
    assert torch.equal(swiglu(leaves[0]), swiglu(leaves[0]))
