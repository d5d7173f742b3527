"""Places of a stream as ranges of shards, and which of them were taken."""

import numpy as np
import pytest

from tandem.trainer.data.manifest import Shard, Split
from tandem.trainer.data.shuffle import Order
from tandem.trainer.tools.audit import coverage
from tandem.trainer.tools.audit.coverage import Coverage
from tandem.trainer.tools.audit.reading_order import Expansion, Pieces, rows
from tests.trainer.tools.audit.runs import BLOCK, SEED, WINDOW, shard_pieces


@pytest.mark.parametrize(("block", "window"), [(64, 320), (64, 1), (64, 10**6), (0, 5), (10**6, 10**6)])
def test_places_are_expanded_as_the_reader_finds_them(block, window):
    draw = np.random.default_rng(block + window)
    shards = [Shard(f"{index}.tar", 0, int(tokens), 0, "", "") for index, tokens in enumerate(draw.integers(1, 900, 9))]
    split = Split(sum(shard.tokens for shard in shards), 0, shards)
    order = Order(split.tokens, block_tokens=block, window_tokens=window, name="a", seed=SEED)
    expansion = Expansion(split, name="a", seed=SEED, block_tokens=block, window_tokens=window)
    for start in (0, split.tokens - 70, int(draw.integers(3 * split.tokens))):
        pieces, starts = rows(expansion.pieces(start, start + 10 * 37), 37)
        assert len(starts) == 11
        for row in range(10):
            stream = [at + place for at, taken in order.runs(start + row * 37, 37) for place in range(taken)]
            mine = slice(starts[row], starts[row + 1])
            found = list(
                zip(*(array[mine].tolist() for array in (pieces.shard, pieces.first, pieces.tokens)), strict=True)
            )
            assert found == shard_pieces(split, "a", stream)


def test_coverage_finds_what_is_taken_twice_and_forgets_what_is_whole(monkeypatch):
    monkeypatch.setattr(coverage, "PENDING_PIECES", 20)
    shards = [Shard(f"{index}.tar", 0, 500 + index, 0, "", "") for index in range(6)]
    split = Split(sum(shard.tokens for shard in shards), 0, shards)
    expansion = Expansion(split, name="a", seed=SEED, block_tokens=BLOCK, window_tokens=WINDOW)
    taken, most = Coverage(expansion), 0
    for start in range(0, 20 * split.tokens, 100):
        assert not len(taken.add(expansion.pieces(start, start + 100)))
        most = max(most, taken.num_intervals)
    assert not len(taken.sorted_in())
    assert taken.tokens == -(-20 * split.tokens // 100) * 100
    assert most < 20 + 2 * WINDOW // BLOCK + len(shards), "an epoch that is whole is one interval"
    taken.add(Pieces(*(np.array([value]) for value in (7 * split.tokens, 3, 10, 25))))
    twice = taken.sorted_in()
    assert expansion.named(twice) == ["3.tar:10+25"]
    assert twice.position // split.tokens == [7]
