"""The norm of each head against its definition in fp64."""

import pytest
import torch

from kernels.layer_norm import head_norm

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
