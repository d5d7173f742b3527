"""The reading order is a permutation: no token is lost or repeated."""

import pytest

from tandem.trainer.data.shuffle import BlockShuffle

EPOCH, BLOCK = 1_000, 64


def order(seed=1, shuffle_block_tokens=BLOCK, shuffle_window_tokens=5 * BLOCK):
    return BlockShuffle(
        EPOCH,
        shuffle_block_tokens=shuffle_block_tokens,
        shuffle_window_tokens=shuffle_window_tokens,
        source="corpus",
        seed=seed,
    )


def positions(found: BlockShuffle, first: int, count: int) -> list[int]:
    return [start + place for start, taken in found.stream_ranges(first, count) for place in range(taken)]


@pytest.mark.parametrize("shuffle_window_tokens", [1, 5 * BLOCK, 10 * EPOCH])
def test_every_epoch_holds_each_of_its_positions_once(shuffle_window_tokens):
    found = order(shuffle_window_tokens=shuffle_window_tokens)
    for epoch in range(3):
        read = positions(found, epoch * EPOCH, EPOCH)
        assert sorted(read) == list(range(epoch * EPOCH, (epoch + 1) * EPOCH))


def test_windows_cut_anywhere_agree_with_one_reading():
    found, whole = order(), positions(order(), 0, 3 * EPOCH)
    assert [p for first in range(0, 3 * EPOCH, 37) for p in positions(found, first, 37)][: 3 * EPOCH] == whole


def test_blocks_stay_whole_and_within_their_window():
    read = positions(order(), 0, EPOCH)
    for first in range(0, EPOCH - BLOCK, BLOCK):
        block = read[first : first + BLOCK]
        assert block == list(range(block[0], block[0] + BLOCK))
        assert block[0] // (5 * BLOCK) == first // (5 * BLOCK)


def test_blocks_are_shuffled_by_seed_and_epoch():
    first, second = positions(order(), 0, EPOCH), [p - EPOCH for p in positions(order(), EPOCH, EPOCH)]
    assert first != sorted(first)
    assert first != second
    assert first != positions(order(seed=2), 0, EPOCH)
    assert first == positions(order(), 0, EPOCH)


def test_no_seed_or_no_blocks_reads_in_order():
    for found in (order(seed=None), order(shuffle_block_tokens=0)):
        assert positions(found, 0, 2 * EPOCH) == list(range(2 * EPOCH))
