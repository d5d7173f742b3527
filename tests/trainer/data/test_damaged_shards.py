"""Shards that are left out, and sources that end: the same rows on every rank, whichever met it, and nobody waits for ever."""

import dataclasses
import threading
from bisect import bisect_left
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from tandem.trainer.config import Phase, UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.damaged_shards import agreed, agreed_batches, given_up
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.runtime import Stopped
from tests.trainer.data.loaders import Tokens, globally, loader, ranks, schedule_of, side_by_side, steps

BLOCKS = {"block_tokens": 64, "window_tokens": 256}
PHASE = Phase("p", 24 * 8 * 32, 32, 8, 1, {"a": 0.75, "b": 0.25})


@pytest.fixture
def sources(make_corpus):
    return {"a": str(make_corpus("a", seed=1, documents=60)), "b": str(make_corpus("b", seed=2, documents=30))}


def flipped(file):
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-512])


DAMAGE = {"flipped": flipped, "truncated": truncated, "missing": lambda file: file.unlink()}


def skipping(loaders):
    """What ranks side by side read: `globally` of each step, and for each rank what it met itself and what it left out when."""

    def read(rank, exchange):
        met, left_out = [], []

        def told(found):
            met.extend([found] if found else [])
            return exchange(found)

        def leave_out(step, found):
            left_out.append((step, found))
            loaders[rank].skip(*found)

        return list(agreed_batches(loaders[rank], 0, None, told, leave_out)), met, left_out

    batches, met, left_out = zip(*side_by_side(len(loaders), read), strict=True)
    return [globally(step) for step in zip(*batches, strict=True)], met, left_out


def met_by_the_second_of_two(folder):
    """A file of the source and the step that needs it first, of which only the second rank's rows do."""
    tokens, position = Tokens(folder, "a", **BLOCKS), 0
    known = set()
    for step in range(PHASE.steps):
        needed = (set(), set())
        for row, source in enumerate(row_sources(PHASE, step * PHASE.rows, PHASE.rows)):
            if source == "a":
                here = range(position, position + PHASE.seq_len)
                needed[row * 2 // PHASE.rows].update(shard for each in here for shard in tokens.needed(each))
                position = here.stop
        if only := needed[1] - needed[0] - known:
            return tokens.files[min(only)], step
        known |= needed[0] | needed[1]
    raise AssertionError("no such shard; change the corpus")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_one_rank_finds_damaged_is_left_out_by_all_and_rows_are_those_of_one_rank(
    sources, damage, workers
):
    file, step = met_by_the_second_of_two(sources["a"])
    DAMAGE[damage](manifest.Path(sources["a"]) / file)
    settings = {"damaged_shards": "skip", "workers": workers, **BLOCKS}
    schedule = schedule_of(PHASE)
    expected, _, _ = skipping([loader(sources, schedule, **settings)])
    two = ranks(sources, schedule, 2, **settings)
    found, met, left_out = skipping(two)
    assert met == ([], [("a", file)]), "only the second rank's rows touch it"
    assert left_out == ([(step, ("a", file))],) * 2
    assert found == expected
    assert len(found) == PHASE.steps
    assert [each.skipped for each in two] == [{"a": [file]}] * 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data_")]
    resumed = loader(sources, schedule, **settings)
    resumed.skip("a", file)
    assert list(steps([resumed], step + 2, expected[step + 1][2])) == expected[step + 2 :], (
        "what was left out is taken up"
    )


def test_behind_the_cursor_every_token_that_is_not_left_out_is_read_in_its_turn(sources):
    whole = Tokens(sources["a"], "a", **BLOCKS)
    file, _ = met_by_the_second_of_two(sources["a"])
    one = loader(sources, schedule_of(PHASE), **BLOCKS)
    cursor = next(one.batches(0, None)).cursor
    one.skip("a", file)
    rows = []
    for step, batch in enumerate(one.batches(1, cursor), 1):
        of_rows = row_sources(PHASE, step * PHASE.rows, PHASE.rows)
        rows += [row.numpy() for row, source in zip(batch.tokens, of_rows, strict=True) if source == "a"]
    assert batch.cursor["a"] > 1.5 * whole.tokens, "the run must pass the end of an epoch"
    kept = whole.kept(cursor["a"], batch.cursor["a"], (file,))
    assert kept[-1] + 1 == batch.cursor["a"]
    assert np.array_equal(np.concatenate(rows), whole.ids(kept))


def test_every_further_damage_is_left_out_too_and_none_left_is_refused(sources):
    corpus = manifest.load(sources["b"])
    for shard in corpus.train.shards:
        flipped(manifest.Path(sources["b"]) / shard.file)
    with pytest.raises(UserError, match=r"data.sources.b: every training shard is damaged, .* nothing is left to read"):
        skipping(ranks(sources, schedule_of(PHASE), 2, damaged_shards="skip", **BLOCKS))


def test_a_target_is_the_next_token_that_is_not_left_out(sources):
    """The last token of a shard before one that is left out is followed by the first of the shard behind that."""
    phase = Phase("p", 20 * 64, 64, 1, 1, {"a": 1.0})
    one = loader(sources, schedule_of(phase), block_tokens=0, damaged_shards="skip")
    order, _ = one._train["a"].stream._epoch(0)
    corpus = manifest.load(sources["a"])
    out = corpus.train.shards[order[1]].file
    (manifest.Path(sources["a"]) / out).unlink()
    one.skip("a", out)
    batches = list(one.batches(0, None))
    tokens = np.concatenate([batch.tokens[0].numpy() for batch in batches])
    targets = np.concatenate([batch.targets[0].numpy() for batch in batches])
    assert np.array_equal(targets[:-1], tokens[1:])


def test_positions_left_out_are_counted_as_if_one_by_one(sources):
    whole = Tokens(sources["a"], "a", **BLOCKS)
    one = loader(sources, schedule_of(PHASE), **BLOCKS)
    files = whole.files[1:4]
    for file in files:
        one.skip("a", file)
    source = one._train["a"]
    kept = whole.kept(0, 2 * whole.tokens, files)
    for position in [*range(0, 2 * whole.tokens, 211), whole.tokens, 2 * whole.tokens]:
        before = bisect_left(kept, position)
        assert source.left_out(position) == position - before, position
        if before:
            assert source.after(0, before) == kept[before - 1] + 1


def test_held_out_rows_without_a_damaged_shard_are_the_same_on_all_ranks(sources):
    folder = manifest.Path(sources["a"])
    only_a = Phase("p", PHASE.tokens, 32, 8, 2, {"a": 1.0})
    # The training split as the held-out one, which then has several shards.
    corpus = dataclasses.replace(manifest.load(folder), validation=manifest.load(folder).train)
    (folder / manifest.FILE).write_text(manifest.dump(corpus))
    first, second, *_ = corpus.validation.shards
    (folder / first.file).unlink()
    loaders = ranks(sources, schedule_of(only_a), 2, damaged_shards="skip")

    def read(rank, exchange):
        return agreed(
            lambda: list(loaders[rank].validation(only_a, 64)), exchange, lambda met: loaders[rank].skip(*met)
        )

    rows = np.concatenate([batch.tokens.numpy() for batches in side_by_side(2, read) for batch in batches])
    assert second.tokens >= 64
    shard = (folder / second.file).read_bytes()[512 : 512 + 2 * 64]
    assert np.array_equal(rows.reshape(-1), np.frombuffer(shard, "<u2"))
    assert [each.skipped for each in loaders] == [{"a": [first.file]}] * 2


@pytest.mark.parametrize("num_left", [1, 0])
def test_held_out_rows_are_those_that_damage_leaves_or_none(sources, num_left):
    """Asked for as many as there were, a run is not refused: it goes on with the whole rows of the last shard."""
    folder, phase = manifest.Path(sources["a"]), dataclasses.replace(PHASE, mixture={"a": 1.0})
    corpus = manifest.load(folder)
    (folder / manifest.FILE).write_text(manifest.dump(dataclasses.replace(corpus, validation=corpus.train)))
    asked = corpus.train.tokens // 32 * 32
    one = loader({"a": sources["a"]}, schedule_of(phase), damaged_shards="skip")
    assert sum(len(batch.tokens) for batch in one.validation(phase, asked)) * 32 == asked
    border = len(corpus.train.shards) - num_left
    kept = corpus.train.shards[border:]
    for shard in corpus.train.shards[:border]:
        # Not Loader.skip, which would leave the training shards of that name out too.
        one._held_out["a"].stream.leave_out(shard.file)
    rows = [batch.tokens.numpy() for batch in one.validation(phase, asked)]
    assert sum(map(len, rows)) == sum(shard.tokens for shard in kept) // 32
    for shard in kept:
        ids = np.frombuffer((folder / shard.file).read_bytes()[512 : 512 + 2 * 512], "<u2")
        assert np.array_equal(np.concatenate(rows).reshape(-1)[:512], ids[: shard.tokens // 32 * 32])
    with pytest.raises(UserError, match=r"evaluate.tokens: .* lower it"):
        one.validation(phase, asked + 32)


def limited(sources, size=1, epochs=1.5, **fields):
    settings = {"max_epochs": {"b": epochs}, "damaged_shards": "skip", **BLOCKS, **fields}
    return ranks(sources, schedule_of(PHASE), size, **settings)


def test_a_schedule_that_reads_a_source_too_often_is_refused_at_the_start(sources):
    tokens = manifest.load(sources["b"]).train.tokens
    needed = PHASE.steps * 2 * 32
    epochs = (needed - 1) / tokens
    message = rf"^data.max_epochs.b: the schedule takes {needed} tokens; .* times the {tokens} of .* are {needed - 1}; raise it"
    with pytest.raises(UserError, match=message) as refused:
        limited(sources, epochs=epochs)
    assert "\n" not in str(refused.value)
    [enough] = limited(sources, epochs=(needed + 0.5) / tokens)
    assert enough.end(0, None) == (PHASE.steps, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_at_the_end_of_a_source_all_ranks_stop_after_the_same_last_whole_step(sources, workers):
    """With 5.5 steps' worth of tokens of "b", 5 steps; a resume knows the same end."""
    step_tokens = 2 * 32
    epochs = 5.5 * step_tokens / manifest.load(sources["b"]).train.tokens
    loaders = limited(sources, 2, epochs, at_end="stop", workers=workers)
    assert {each.end(0, None) for each in loaders} == {(5, "b")}
    found, _, _ = skipping(loaders)
    assert len(found) == 5
    assert found == list(steps(ranks(sources, schedule_of(PHASE), 1, **BLOCKS)))[:5]
    assert [each.end(3, found[2][2]) for each in loaders] == [(5, "b")] * 2
    assert list(steps(loaders, 5, found[4][2])) == []
    assert [each.end(5, found[4][2]) for each in loaders] == [(5, "b")] * 2


def test_a_shard_left_out_takes_its_tokens_from_what_a_limited_source_can_feed(sources):
    """Once each, and no token more often, although a shard is missing: met late, by one rank of two."""
    whole = Tokens(sources["b"], "b", **BLOCKS)
    phase = Phase("p", 40 * 4 * 32, 32, 4, 1, {"b": 1.0})
    file = whole.files[whole.place(whole.tokens * 2 // 3)[0]]
    (manifest.Path(sources["b"]) / file).unlink()
    settings = {"max_epochs": {"b": 1.0}, "at_end": "stop", "damaged_shards": "skip", **BLOCKS}
    loaders = ranks({"b": sources["b"]}, schedule_of(phase), 2, **settings)
    assert loaders[0].end(0, None)[0] == whole.tokens // phase.batch_tokens
    found, _, left_out = skipping(loaders)
    kept = len(whole.kept(0, whole.tokens, (file,)))
    assert len(found) == kept // phase.batch_tokens < whole.tokens // phase.batch_tokens
    assert left_out[0] == left_out[1]
    assert found[-1][2]["b"] <= whole.tokens


def test_where_a_source_that_ends_is_to_be_refused_it_is_when_a_shard_left_out_makes_it_end(sources):
    """Not stopped early without a word: at the step that found the shard, and at each resume that has it left out."""
    tokens = manifest.load(sources["b"]).train.tokens
    needed = PHASE.steps * 2 * 32
    [one] = limited(sources, epochs=(needed + 0.5) / tokens, at_end="refuse")
    batches = one.batches(0, None)
    cursor = next(batches).cursor
    batches.close()
    whole = Tokens(sources["b"], "b", **BLOCKS)
    file = whole.files[whole.place(needed - 1)[0]]
    lost = needed - cursor["b"] - len(whole.kept(cursor["b"], needed, (file,)))
    one.skip("b", file)
    message = (
        rf"^data.max_epochs.b: the schedule takes {needed} tokens; .* are {needed}, {lost} of those ahead in damaged"
    )
    for refused in (lambda: one.end(1, cursor), lambda: next(one.batches(1, cursor))):
        with pytest.raises(UserError, match=message) as said:
            refused()
        assert "\n" not in str(said.value)


def test_what_is_read_ahead_is_waited_for_unless_a_signal_has_come():
    seen = []

    def batches():
        try:
            yield
        except Stopped:
            seen.append("not waited for")
            raise
        except GeneratorExit:
            seen.append("waited for")
            raise

    @contextmanager
    def signalled():
        raise Stopped
        yield

    for reading in (nullcontext, signalled):
        next(begun := batches())
        given_up(begun, reading)
        assert begun.gi_frame is None
    assert seen == ["waited for", "not waited for"]
