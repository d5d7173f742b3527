"""LayerNorm against torch's in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tandem.kernels.layer_norm import layer_norm

EPSILON = 1e-5


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_stream_and_every_gradient_round_once(biased, dtype, generator):
    """Includes the gradients of weight and bias: sums over 4,096 positions, which bf16 could not add up."""
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
