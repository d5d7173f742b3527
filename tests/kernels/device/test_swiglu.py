"""The SwiGLU kernels against their meaning in fp64."""

import pytest
import torch

from tandem.kernels.device import swiglu as kernels

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
SHAPES = [(1, 2, 1), (1, 2, 128), (3, 2, 7), (5, 2, 131), (2, 3, 2, 300), (17, 2, 256)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def example(shape, dtype, generator, device):
    gate_up = torch.randn(shape, generator=generator).mul(3).to(device, dtype)
    return gate_up, torch.randn(shape[:-2] + shape[-1:], generator=generator).to(device, dtype)


def exact(gate_up, out_gradient, gate=0):
    """Return result and gradient in fp64 by autograd of the definition, each with the largest error of fp32 arithmetic.

    The exponential of g, in powers of two, is off by g roundings; the handful of other operations by one each. In the gradient
    of g the two terms cancel, so that the error is one of their sizes.
    """
    wide = gate_up.detach().cpu().double().requires_grad_()
    g, u = wide.select(-2, gate), wide.select(-2, 1 - gate)
    result = torch.nn.functional.silu(g) * u
    dy = out_gradient.cpu().double()
    (gradient,) = torch.autograd.grad(result, wide, dy)
    g, u, result = g.detach(), u.detach(), result.detach()
    roundings, s = 8 * 2**-24 * (1 + g.abs()), g.sigmoid()
    halves = [dy * u * s * (1 + g.abs() * (1 - s)), dy * g * s]
    sizes = torch.stack(halves if gate == 0 else halves[::-1], dim=-2)
    return (result, roundings * result.abs()), (gradient, roundings.unsqueeze(-2) * sizes.abs())


def close(found, exact):
    """bf16 results are rounded once more, by half a unit in the last place. Numbers too small for fp32 may be 0."""
    true, limit = exact
    last = 2**-8 * true.abs() if found.dtype == torch.bfloat16 else 0
    underflow = 1_000 * torch.finfo(torch.float32).tiny
    assert ((found.cpu().double() - true).abs() <= limit + last + underflow).all()


@DTYPES
@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradient_are_the_meaning_rounded_once(shape, gate, dtype, generator, device):
    gate_up, out_gradient = example(shape, dtype, generator, device)
    result, gradient = exact(gate_up, out_gradient, gate)
    close(kernels.forward(gate_up, gate), result)
    found, product = kernels.backward(out_gradient, gate_up, gate, with_product=True)
    close(found, gradient)
    assert torch.equal(product, kernels.forward(gate_up, gate))
    without, nothing = kernels.backward(out_gradient, gate_up, gate, with_product=False)
    assert torch.equal(without, found)
    assert nothing.numel() == 0


def test_halves_of_a_wider_buffer_are_read_where_they_lie(generator, device):
    """Strided rows, and a projection [rows, seq, 2 * ffn_hidden_size] viewed as two halves. Other layouts are copied."""
    buffer = torch.randn(4, 3, 400, generator=generator).to(device)
    inside = buffer[..., 8:208].unflatten(-1, (2, 100))
    transposed = torch.randn(2, 100, 7, generator=generator).to(device).permute(2, 0, 1)
    for gate_up in (inside, inside[::2], inside.transpose(0, 1), transposed):
        assert not gate_up.is_contiguous()
        packed = gate_up.contiguous()
        assert torch.equal(kernels.forward(gate_up, 0), kernels.forward(packed, 0))
        out_gradient = torch.randn(packed.shape[:-2] + packed.shape[-1:], generator=generator).to(device)
        pair = [kernels.backward(out_gradient, x, 0, with_product=False)[0] for x in (gate_up, packed)]
        assert torch.equal(*pair)


def test_large_gates_neither_overflow_nor_vanish_wrongly(device):
    gate_up = torch.tensor([[-200.0, -20.0, 20.0, 200.0], [3.0, 3.0, 3.0, 3.0]], device=device)
    out_gradient = torch.ones(4, device=device)
    result, gradient = exact(gate_up, out_gradient)
    close(kernels.forward(gate_up, 0), result)
    close(kernels.backward(out_gradient, gate_up, 0, with_product=False)[0], gradient)


def test_inputs_are_unchanged_and_the_bits_repeat(generator, device):
    tensors = example((9, 2, 150), torch.bfloat16, generator, device)
    before = [tensor.clone() for tensor in tensors]
    gate_up, out_gradient = tensors
    first, second = (
        (kernels.forward(gate_up, 0), *kernels.backward(out_gradient, gate_up, 0, with_product=True)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8_192, 1, 2, 6_912), (4_096, 1, 2, 13_824)], ids=["btlm", "stablelm"])
def test_gpu_error_is_at_most_a_tenth_above_that_of_torch_in_bf16(shape, generator, device):
    gate_up, out_gradient = example(shape, torch.bfloat16, generator, device)
    wide = gate_up.double().requires_grad_()
    true = torch.nn.functional.silu(wide.select(-2, 0)) * wide.select(-2, 1)
    narrow = gate_up.clone().requires_grad_()
    theirs = torch.nn.functional.silu(narrow.select(-2, 0)) * narrow.select(-2, 1)
    true_gradient, their_gradient = (
        torch.autograd.grad(result, leaf, out_gradient.to(result.dtype))[0]
        for result, leaf in ((true, wide), (theirs, narrow))
    )
    gradient, product = kernels.backward(out_gradient, gate_up, 0, with_product=True)
    assert torch.equal(product, kernels.forward(gate_up, 0))
    for mine, other, exact_value in ((product, theirs, true), (gradient, their_gradient, true_gradient)):
        assert (mine - exact_value).norm() <= 1.1 * (other - exact_value).norm()
