"""Errors of the loader: a test replaces one of its functions, and the ledger records what the loader read."""

import pytest

from tandem.trainer.data import mixture
from tandem.trainer.data.digests import Digests, pack_u64, unpack_u64
from tandem.trainer.data.shuffle import BlockShuffle
from tests.trainer.tools.audit.runs import (
    FRESH_STATE,
    LONG_PHASE,
    SHORT_PHASE,
    ExpectedStep,
    findings,
    read_lines,
    rows_of_source,
    step_line,
    write_full_run,
    write_ledger,
    write_lines,
)


def read_elsewhere(monkeypatch, source: str, moves: list[tuple[int, int, int]]) -> None:
    """Make the loader read positions [start, end) of the source from `target` on, for each (start, end, target)."""
    right = BlockShuffle.stream_ranges

    def runs(self, position, count):
        if self._source != source or self._seed is None:
            return right(self, position, count)
        found = []
        while count:
            borders = [border for start, end, _ in moves for border in (start, end) if border > position]
            taken = min([count, *(border - position for border in borders)])
            target = next((to + position - start for start, end, to in moves if start <= position < end), position)
            found += right(self, target, taken)
            position, count = position + taken, count - taken
        return found

    monkeypatch.setattr(BlockShuffle, "stream_ranges", runs)


@pytest.fixture
def misread(tmp_path, sources, monkeypatch):
    """misread("a", moves): the findings about a run that was read with `read_elsewhere`."""

    def make(source, moves):
        with monkeypatch.context() as patched:
            read_elsewhere(patched, source, moves)
            write_full_run(tmp_path / "misread", sources)
        return findings(tmp_path / "misread")

    return make


def test_a_row_that_reads_what_another_is_for_is_named_and_what_it_read(whole, misread):
    step = ExpectedStep(whole, 5)
    row, other = rows_of_source(step, "a")[1], rows_of_source(step, "a")[4]
    at, target = step.positions[row], step.positions[other]
    [found] = misread("a", [(at, at + 32, target)])
    assert (found.kind, found.step, found.source, found.rows) == ("repeated", 5, "a", [(5, row), (5, other)])
    assert found.shard_ranges == [*step.shards(row), *step.shards(other)]
    assert (found.lost_tokens, found.repeated_tokens) == (32, 32)


def test_two_rows_swapped_in_a_step_are_named(whole, misread):
    step = ExpectedStep(whole, 8)
    one, other = rows_of_source(step, "b")[0], rows_of_source(step, "b")[2]
    at, to = step.positions[one], step.positions[other]
    [found] = misread("b", [(at, at + 128, to), (to, to + 128, at)])
    assert (found.kind, found.step, found.source, found.rows) == ("swapped", 8, "b", [(8, one), (8, other)])
    assert found.shard_ranges == [*step.shards(one), *step.shards(other)]
    assert (found.lost_tokens, found.repeated_tokens) == (0, 0)


def test_two_rows_swapped_with_the_next_step_are_named_once(whole, misread):
    first, second = ExpectedStep(whole, 2), ExpectedStep(whole, 3)
    one, other = rows_of_source(first, "a")[2], rows_of_source(second, "a")[3]
    at, to = first.positions[one], second.positions[other]
    [found] = misread("a", [(at, at + 32, to), (to, to + 32, at)])
    assert (found.kind, found.step, found.source, found.rows) == ("swapped", 2, "a", [(2, one), (3, other)])
    assert set(found.shard_ranges) == {*first.shards(one), *second.shards(other)}


def test_a_row_passed_over_is_named_and_the_steps_after_that_read_a_row_too_far(whole, misread):
    step = ExpectedStep(whole, 11)
    row = rows_of_source(step, "c")[1]
    found = misread("c", [(step.positions[row], 1 << 40, step.positions[row] + 64)])
    assert [(each.kind, each.step, each.source) for each in found] == [("lost", number, "c") for number in (11, 12, 13)]
    assert found[0].rows == [(11, row)]
    assert found[0].shard_ranges == step.shards(row)
    assert found[0].lost_tokens == 64
    assert found[1].rows == [(12, rows_of_source(ExpectedStep(whole, 12), "c")[0])]


def test_a_row_read_again_in_the_place_of_the_next_is_named(whole, misread):
    step = ExpectedStep(whole, 13)
    line = rows_of_source(step, "c")
    [found] = misread("c", [(step.positions[line[1]], 1 << 40, step.positions[line[0]])])
    assert (found.kind, found.step, found.source, found.rows) == ("repeated", 13, "c", [(13, line[1])])
    assert found.shard_ranges == step.shards(line[1])


@pytest.mark.parametrize("tokens", [1, -3])
def test_a_row_that_begins_at_a_wrong_token_is_named(whole, misread, tokens):
    step = ExpectedStep(whole, 4)
    row = rows_of_source(step, "b")[1]
    at = step.positions[row]
    [found] = misread("b", [(at, at + 32, at + tokens)])
    assert (found.kind, found.step, found.source, found.rows) == ("unlike", 4, "b", [(4, row)])
    assert found.shard_ranges == step.shards(row)
    assert f"was read {abs(tokens)} tokens {'later' if tokens > 0 else 'earlier'}" in found.message


def test_a_source_that_is_read_elsewhere_in_a_step_is_named(whole, misread):
    step = ExpectedStep(whole, 9)
    at, end = step.line["read_ranges"]["b"]
    [found] = misread("b", [(at, end, at + 5)])
    assert (found.kind, found.step, found.source) == ("unlike", 9, "b")
    assert "all rows of b were read 5 tokens later" in found.message


def test_ranges_that_no_single_row_explains_are_named_by_step_and_shards(whole, misread):
    step = ExpectedStep(whole, 6)
    a, b, c = rows_of_source(step, "a")[:3]
    at = [step.positions[row] for row in (a, b, c)]
    [found] = misread("a", [(at[0], at[0] + 32, at[1]), (at[1], at[1] + 32, at[2]), (at[2], at[2] + 32, at[0])])
    assert (found.kind, found.step) == ("unlike", 6)
    assert "no single row explains it" in found.message
    assert found.shard_ranges


def test_shares_given_to_the_wrong_sources_are_named_without_asking_the_loader_who_gets_a_row(
    tmp_path, sources, monkeypatch
):
    right = mixture._rows_per_period
    monkeypatch.setattr(mixture, "_rows_per_period", lambda shares: right(shares)[::-1])
    caches = (mixture._source_pattern, mixture._rows_by_source)
    for cache in caches:
        cache.cache_clear()
    try:
        write_ledger(tmp_path, {name: sources[name] for name in "ab"}, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 12, 1)
        found = findings(tmp_path)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert [(each.kind, each.step, each.source) for each in found] == [("unlike", 6, "a"), ("unlike", 12, "a")]
    assert "phase short has taken 22 rows of a; its share is 50.4" in found[0].message


def test_tensor_parallel_ranks_that_disagree_are_stopped_or_named(folder):
    lines, step = read_lines(folder), ExpectedStep(folder, 5)
    own = [step.hash(row, row) for row in range(12)]
    for row, other in ((row, other) for row in range(12) for other in range(12) if row != other):
        misled = sum(own) - own[row] + step.hash(row, other)
        ranks = [Digests(sum(own) % 2**64, 0), Digests(misled % 2**64, 0)]
        summed = [sum(parts) for parts in zip(*map(pack_u64, ranks), strict=True)]
        if any(half % 2 for half in summed):
            with pytest.raises(RuntimeError, match="not divisible by tp_size 2"):
                unpack_u64(summed, tp_size=2)
            continue
        step_line(lines, 5)["ranges_digest"] = f"{unpack_u64(summed, tp_size=2).ranges_digest:016x}"
        break
    write_lines(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, found.rows) == ("repeated", 5, [(5, row), (5, other)])
    assert "on one of 2 tensor-parallel ranks" in found.message
