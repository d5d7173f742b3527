"""The norms of the stream and of each head against their definitions in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.layer_norm import head_norm, layer_norm

EPSILON = 1e-5


def definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 7), (1, 4, 2, 160)])
def test_every_head_is_normalised_by_itself_with_its_own_weight(shape, generator):
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight = torch.randn(shape[2:], generator=generator)
    torch.testing.assert_close(head_norm(x, weight, EPSILON).double(), definition(x, weight), rtol=1e-5, atol=1e-5)


def test_gradients_are_exact_in_double(generator):
    x = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: head_norm(x, weight, EPSILON), (x, weight))


def test_bf16_result_is_the_fp64_result_rounded_once(generator):
    x = torch.randn(2, 9, 3, 40, generator=generator).bfloat16()
    weight = torch.randn(3, 40, generator=generator).bfloat16()
    one_rounding = {"rtol": 0.51 * torch.finfo(torch.bfloat16).eps, "atol": 1e-5}
    torch.testing.assert_close(head_norm(x, weight, EPSILON).double(), definition(x, weight), **one_rounding)


def test_inputs_are_unchanged_and_the_bits_repeat(generator):
    x, weight = torch.randn(1, 2, 3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    before = x.clone(), weight.clone()
    first, second = head_norm(x, weight, EPSILON), head_norm(x, weight, EPSILON)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(first, second)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_stream_and_every_gradient_round_once(biased, dtype, generator):
    """The weight's and bias's too, which are sums over all positions: 4,096 here, which bf16 could not add up."""
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in ((4_096, 96), (96,), (96,))[: 2 + biased]]
    upstream = torch.randn(4_096, 96, generator=generator).to(dtype)

    def evaluated(norm, dtype: torch.dtype) -> list[torch.Tensor]:
        own = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        normal = norm(own[0], own[1], own[2] if biased else None)
        normal.backward(upstream.to(dtype))
        return [normal.detach().double(), *(leaf.grad.double() for leaf in own)]

    found = evaluated(lambda x, weight, bias: layer_norm(x, weight, bias, EPSILON), dtype)
    exact = evaluated(lambda x, weight, bias: F.layer_norm(x, (96,), weight, bias, EPSILON), torch.float64)
    # One rounding to bf16, twice over; in fp32 half a unit in the last place at each of 4,096 additions, at random.
    limit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 4_096**0.5 * 2**-24
    for mine, true in zip(found, exact, strict=True):
        assert float((mine - true).norm() / true.norm()) <= limit
