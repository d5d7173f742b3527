"""How attention is divided into programs at the sizes of the shipped models."""

import pytest
import torch

from tandem.kernels.device.attention_tiling import num_heads_in_l2, num_heads_per_program


@pytest.mark.parametrize(
    ("num_kv_heads", "heads_together"),
    [(8, 4), (4, 2), (2, 1), (32, 4)],
    ids=["12b", "12b tp2", "12b tp4", "many key heads"],
)
def test_query_heads_are_walked_together_unless_programs_would_be_few(num_kv_heads, heads_together):
    """Groups of four query heads in a row of 4,096 tokens: 32 blocks of keys."""
    assert num_heads_per_program(32 * num_kv_heads, 4) == heads_together


@pytest.mark.parametrize(("programs", "heads_together"), [(256, 6), (255, 3), (128, 3), (127, 2), (60, 1), (0, 1)])
def test_as_many_heads_as_leave_enough_programs(programs, heads_together):
    assert num_heads_per_program(programs, 6) == heads_together


@pytest.mark.parametrize(
    ("seq", "num_kv_heads", "head_dim", "sharing", "heads"),
    [
        (8_192, 32, 80, 1, 10),
        (2_048, 32, 80, 1, 40),
        (4_096, 8, 160, 4, 40),
        (4_096, 32, 160, 1, 10),
        (2**20, 1, 256, 1, 1),
    ],
    ids=["btlm 8k", "btlm 2k", "12b", "12b, gradients of keys", "long"],
)
def test_heads_take_turns_while_what_they_read_fits_half_the_cache(seq, num_kv_heads, head_dim, sharing, heads):
    read = torch.empty(1, seq, num_kv_heads, head_dim, dtype=torch.bfloat16, device="meta")
    assert num_heads_in_l2(read, sharing) == heads
    assert heads == 1 or heads * 2 * seq * head_dim * 2 <= sharing * 25 * 2**20
