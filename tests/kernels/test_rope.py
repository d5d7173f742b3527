"""The angles of rotary positions. test_qkv tests the rotation."""

import math

import torch

from tandem.kernels.rope import rotary_table

BASE = 10_000.0


def test_table_keeps_its_precision_far_out():
    cos, sin = rotary_table(torch.tensor([[32_768]]), 40, BASE)
    angles = [32_768 * BASE ** (-2 * pair / 40) for pair in range(20)]
    torch.testing.assert_close(cos[0, 0], torch.tensor([math.cos(angle) for angle in angles]), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, 0], torch.tensor([math.sin(angle) for angle in angles]), rtol=0, atol=1e-7)
