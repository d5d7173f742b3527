"""Rotary positions against multiplication of complex numbers in fp64."""

import cmath
import math

import pytest
import torch

from kernels.rope import positions, rotary_table, rotate

BASE = 10_000.0


def definition(x: torch.Tensor, index: torch.Tensor, rotary_dims: int) -> torch.Tensor:
    rotated, half = x.double().clone(), rotary_dims // 2
    for row, sequence in enumerate(index.expand(len(x), -1).tolist()):
        for place, position in enumerate(sequence):
            for pair in range(half):
                turn = cmath.exp(1j * position * BASE ** (-2 * pair / rotary_dims))
                first, second = x[row, place, :, pair].double(), x[row, place, :, pair + half].double()
                turned = torch.complex(first, second) * turn
                rotated[row, place, :, pair], rotated[row, place, :, pair + half] = turned.real, turned.imag
    return rotated


@pytest.mark.parametrize(("head_dim", "rotary_dims"), [(2, 2), (7, 4), (160, 40), (10, 10)])
@pytest.mark.parametrize("rows_of_table", [1, 2])
def test_pairs_of_the_two_halves_turn_by_their_angle(head_dim, rotary_dims, rows_of_table, generator):
    x = torch.randn(2, 5, 3, head_dim, generator=generator)
    index = torch.randint(4_096, (rows_of_table, 5), generator=generator)
    rotated = rotate(x, *rotary_table(index, rotary_dims, BASE))
    torch.testing.assert_close(rotated.double(), definition(x, index, rotary_dims), rtol=0, atol=1e-6)


def test_dims_after_the_rotated_part_pass_bit_for_bit(generator):
    x = torch.randn(1, 6, 2, 16, generator=generator).bfloat16()
    rotated = rotate(x, *rotary_table(torch.arange(6)[None] + 100, 4, BASE))
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert not torch.equal(rotated[..., :4], x[..., :4])


def test_scores_depend_on_the_distance_alone(generator):
    query, key = torch.randn(2, 1, 1, 1, 20, generator=generator, dtype=torch.float64).unbind(0)

    def score(to: int, source: int) -> float:
        turned = [rotate(x, *rotary_table(torch.tensor([[p]]), 20, BASE)) for x, p in ((query, to), (key, source))]
        return (turned[0] * turned[1]).sum().item()

    # The table is fp32: each of twenty products carries its rounding.
    assert score(5, 2) == pytest.approx(score(4_005, 4_002), abs=20 * torch.finfo(torch.float32).eps * 10)
    assert abs(score(5, 2) - score(5, 3)) > 0.01


def test_table_keeps_its_precision_far_out():
    cos, sin = rotary_table(torch.tensor([[32_768]]), 40, BASE)
    angles = [32_768 * BASE ** (-2 * pair / 40) for pair in range(20)]
    torch.testing.assert_close(cos[0, 0], torch.tensor([math.cos(angle) for angle in angles]), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, 0], torch.tensor([math.sin(angle) for angle in angles]), rtol=0, atol=1e-7)


def test_positions_restart_with_every_document():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4]], dtype=torch.int32)
    assert positions(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]]


def test_gradients_are_exact_in_double(generator):
    x = torch.randn(2, 3, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_table(torch.tensor([[3, 4, 9]]), 4, BASE)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_bf16_result_is_the_fp64_result_rounded_once(generator):
    x = torch.randn(1, 8, 2, 16, generator=generator).bfloat16()
    index = torch.arange(8)[None] + 2_000
    rotated = rotate(x, *rotary_table(index, 8, BASE))
    one_rounding = {"rtol": 0.51 * torch.finfo(torch.bfloat16).eps, "atol": 1e-6}
    torch.testing.assert_close(rotated.double(), definition(x, index, 8), **one_rounding)


def test_input_is_unchanged_and_the_bits_repeat(generator):
    x, table = torch.randn(1, 4, 2, 8, generator=generator), rotary_table(torch.arange(4)[None], 8, BASE)
    before = x.clone()
    first, second = rotate(x, *table), rotate(x, *table)
    assert torch.equal(x, before)
    assert torch.equal(first, second)
