"""Positions of a stream as ranges of shards, and the ranges that were read."""

import numpy as np
import pytest

from tandem.trainer.data.manifest import CorpusSplit, Shard
from tandem.trainer.data.shuffle import BlockShuffle
from tandem.trainer.tools.audit import coverage
from tandem.trainer.tools.audit.coverage import Coverage
from tandem.trainer.tools.audit.reading_order import ReadingOrder, ShardRanges, cut_rows
from tests.trainer.tools.audit.runs import BLOCK_TOKENS, SEED, WINDOW_TOKENS, shard_pieces


@pytest.mark.parametrize(("block", "window"), [(64, 320), (64, 1), (64, 10**6), (0, 5), (10**6, 10**6)])
def test_places_are_expanded_as_the_reader_finds_them(block, window):
    draw = np.random.default_rng(block + window)
    shards = [Shard(f"{index}.tar", 0, int(tokens), 0, "", "") for index, tokens in enumerate(draw.integers(1, 900, 9))]
    split = CorpusSplit(sum(shard.tokens for shard in shards), 0, shards)
    order = BlockShuffle(split.tokens, shuffle_block_tokens=block, shuffle_window_tokens=window, source="a", seed=SEED)
    expansion = ReadingOrder(split, source="a", seed=SEED, shuffle_block_tokens=block, shuffle_window_tokens=window)
    for start in (0, split.tokens - 70, int(draw.integers(3 * split.tokens))):
        pieces, starts = cut_rows(expansion.shard_ranges(start, start + 10 * 37), 37)
        assert len(starts) == 11
        for row in range(10):
            stream = [at + place for at, taken in order.stream_ranges(start + row * 37, 37) for place in range(taken)]
            mine = slice(starts[row], starts[row + 1])
            found = list(
                zip(
                    *(array[mine].tolist() for array in (pieces.shard_index, pieces.first_token, pieces.tokens)),
                    strict=True,
                )
            )
            assert found == shard_pieces(split, "a", stream)


def test_coverage_finds_what_is_taken_twice_and_forgets_what_is_whole(monkeypatch):
    monkeypatch.setattr(coverage, "MAX_PENDING_RANGES", 20)
    shards = [Shard(f"{index}.tar", 0, 500 + index, 0, "", "") for index in range(6)]
    split = CorpusSplit(sum(shard.tokens for shard in shards), 0, shards)
    expansion = ReadingOrder(
        split, source="a", seed=SEED, shuffle_block_tokens=BLOCK_TOKENS, shuffle_window_tokens=WINDOW_TOKENS
    )
    taken, most = Coverage(expansion), 0
    for start in range(0, 20 * split.tokens, 100):
        assert not len(taken.add(expansion.shard_ranges(start, start + 100)))
        most = max(most, sum(len(starts) for starts, _ in taken._intervals.values()))
    assert not len(taken.flush())
    assert taken.tokens == -(-20 * split.tokens // 100) * 100
    assert most < 20 + 2 * WINDOW_TOKENS // BLOCK_TOKENS + len(shards), "an epoch that is whole is one interval"
    taken.add(ShardRanges(*(np.array([value]) for value in (7 * split.tokens, 3, 10, 25))))
    twice = taken.flush()
    assert expansion.shard_range_names(twice) == ["3.tar:10+25"]
    assert twice.position // split.tokens == [7]
