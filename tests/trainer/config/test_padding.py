"""Sizes are padded for tensor cores and tensor-parallel ranks."""

import pytest

from tandem.trainer.config.padding import padded_size


@pytest.mark.parametrize(
    ("size", "tp_size", "expected"),
    [(6_826, 1, 6_912), (6_826, 4, 7_168), (50_257, 2, 50_432), (100_352, 2, 100_352), (1, 1, 128)],
)
def test_padding_rounds_up_to_whole_tiles_on_every_rank(size: int, tp_size: int, expected: int) -> None:
    assert padded_size(size, tp_size) == expected
