"""SwiGLU against its definition in fp64."""

import pytest
import torch

from kernels.swiglu import swiglu

SHAPES = [(2, 1), (3, 2, 7), (2, 5, 2, 33)]


def definition(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double()[..., 0, :], gate_up.double()[..., 1, :]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_the_definition_in_double(shape, generator):
    gate_up = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(gate_up), definition(gate_up))
    assert torch.autograd.gradcheck(swiglu, gate_up)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_result_is_the_fp64_result_rounded_once(shape, generator):
    gate_up = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    output_gradient = torch.randn(shape[:-2] + shape[-1:], generator=generator).bfloat16()
    exact = definition(gate_up)
    (gradient,) = torch.autograd.grad(swiglu(gate_up), gate_up, output_gradient)
    (exact_gradient,) = torch.autograd.grad(exact, gate_up, output_gradient.double())
    # Half a unit in the last place, and a little for the fp32 arithmetic before it.
    one_rounding = {"rtol": 0.51 * torch.finfo(torch.bfloat16).eps, "atol": 1e-6}
    torch.testing.assert_close(swiglu(gate_up).double(), exact, **one_rounding)
    torch.testing.assert_close(gradient.double(), exact_gradient.double(), **one_rounding)


def test_backward_keeps_nothing_but_the_input(generator):
    gate_up = torch.randn(4, 2, 8, generator=generator).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(gate_up)
    assert [x.data_ptr() for x in kept] == [gate_up.data_ptr()]


def test_large_gates_neither_overflow_nor_vanish_wrongly():
    gate_up = torch.tensor([[-200.0, -20.0, 20.0, 200.0], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    output = swiglu(gate_up)
    torch.testing.assert_close(output.double(), definition(gate_up))
    output.sum().backward()
    assert gate_up.grad.isfinite().all()


def test_input_is_unchanged_and_the_bits_repeat(generator):
    gate_up = torch.randn(3, 2, 5, generator=generator)
    before = gate_up.clone()
    first, second = swiglu(gate_up), swiglu(gate_up)
    assert torch.equal(gate_up, before)
    assert torch.equal(first, second)
