"""Skipped shards and sources that end: all ranks agree on the rows, whichever found the damage, and none waits forever."""

import dataclasses
import shutil
import threading
from bisect import bisect_left
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from tandem.trainer.config import PhaseConfig, UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.damaged_shards import batches_skipping_damaged, close_prefetch, read_skipping_damaged
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.runtime.signals import StopRequested
from tests.trainer.data.loaders import (
    TokenReader,
    make_loader,
    make_loaders,
    make_schedule,
    merge_ranks,
    merged_steps,
    run_in_threads,
)

BLOCKS = {"shuffle_block_tokens": 64, "shuffle_window_tokens": 256}
PHASE = PhaseConfig("p", 24 * 8 * 32, 32, 8, 1, {"a": 0.75, "b": 0.25})


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
    """Read on several ranks. Return `merge_ranks` of each step, and the damage that each rank found and skipped, and when."""

    def read(rank, exchange):
        met, left_out = [], []

        def told(found):
            met.extend([found] if found else [])
            return exchange(found)

        def leave_out(step, found):
            left_out.append((step, found))
            loaders[rank].skip_shard(*found)

        return list(batches_skipping_damaged(loaders[rank], 0, None, told, leave_out)), met, left_out

    batches, met, left_out = zip(*run_in_threads(len(loaders), read), strict=True)
    return [merge_ranks(step) for step in zip(*batches, strict=True)], met, left_out


def met_by_the_second_of_two(folder):
    """Return a file of the source that only the second rank needs at first, and the step that needs it."""
    tokens, position = TokenReader(folder, "a", **BLOCKS), 0
    known = set()
    for step in range(PHASE.num_steps):
        needed = (set(), set())
        for row, source in enumerate(row_sources(PHASE, step * PHASE.global_batch_size, PHASE.global_batch_size)):
            if source == "a":
                here = range(position, position + PHASE.seq_len)
                needed[row * 2 // PHASE.global_batch_size].update(
                    shard for each in here for shard in tokens.needed_shards(each)
                )
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
    settings = {"damaged_shards": "skip", "num_workers": workers, **BLOCKS}
    schedule = make_schedule(PHASE)
    expected, _, _ = skipping([make_loader(sources, schedule, **settings)])
    two = make_loaders(sources, schedule, 2, **settings)
    found, met, left_out = skipping(two)
    assert met == ([], [("a", file)]), "only the second rank's rows touch it"
    assert left_out == ([(step, ("a", file))],) * 2
    assert found == expected
    assert len(found) == PHASE.num_steps
    assert [each.skipped_shards for each in two] == [{"a": [file]}] * 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data_")]
    resumed = make_loader(sources, schedule, **settings)
    resumed.skip_shard("a", file)
    assert list(merged_steps([resumed], step + 2, expected[step + 1][2])) == expected[step + 2 :], (
        "what was left out is taken up"
    )


def test_behind_the_cursor_every_token_that_is_not_left_out_is_read_in_its_turn(sources):
    whole = TokenReader(sources["a"], "a", **BLOCKS)
    file, _ = met_by_the_second_of_two(sources["a"])
    one = make_loader(sources, make_schedule(PHASE), **BLOCKS)
    cursor = next(one.batches(0, None)).cursor
    one.skip_shard("a", file)
    rows = []
    for step, batch in enumerate(one.batches(1, cursor), 1):
        of_rows = row_sources(PHASE, step * PHASE.global_batch_size, PHASE.global_batch_size)
        rows += [row.numpy() for row, source in zip(batch.tokens, of_rows, strict=True) if source == "a"]
    assert batch.cursor["a"] > 1.5 * whole.tokens, "the run must pass the end of an epoch"
    kept = whole.positions_outside(cursor["a"], batch.cursor["a"], (file,))
    assert kept[-1] + 1 == batch.cursor["a"]
    assert np.array_equal(np.concatenate(rows), whole.token_ids(kept))


def test_every_further_damage_is_left_out_too_and_none_left_is_refused(sources):
    corpus = manifest.load_manifest(sources["b"])
    for shard in corpus.train.shards:
        flipped(manifest.Path(sources["b"]) / shard.file)
    with pytest.raises(
        UserError, match=r"data.sources.b: all training shards of .* are damaged .last found: .*; restore "
    ):
        skipping(make_loaders(sources, make_schedule(PHASE), 2, damaged_shards="skip", **BLOCKS))


def test_a_target_is_the_next_token_that_is_not_left_out(sources):
    """The target of the last token before a skipped shard is the first token after that shard."""
    phase = PhaseConfig("p", 20 * 64, 64, 1, 1, {"a": 1.0})
    one = make_loader(sources, make_schedule(phase), shuffle_block_tokens=0, damaged_shards="skip")
    order, _ = one._train_readers["a"].stream._cached_epoch_order(0)
    corpus = manifest.load_manifest(sources["a"])
    out = corpus.train.shards[order[1]].file
    (manifest.Path(sources["a"]) / out).unlink()
    one.skip_shard("a", out)
    batches = list(one.batches(0, None))
    tokens = np.concatenate([batch.tokens[0].numpy() for batch in batches])
    targets = np.concatenate([batch.targets[0].numpy() for batch in batches])
    assert np.array_equal(targets[:-1], tokens[1:])


def test_positions_left_out_are_counted_as_if_one_by_one(sources):
    whole = TokenReader(sources["a"], "a", **BLOCKS)
    one = make_loader(sources, make_schedule(PHASE), **BLOCKS)
    files = whole.files[1:4]
    for file in files:
        one.skip_shard("a", file)
    source = one._train_readers["a"]
    kept = whole.positions_outside(0, 2 * whole.tokens, files)
    for position in [*range(0, 2 * whole.tokens, 211), whole.tokens, 2 * whole.tokens]:
        before = bisect_left(kept, position)
        assert source.skipped_tokens_before(position) == position - before, position
        if before:
            assert source.advance(0, before) == kept[before - 1] + 1


def hold_out_the_training_split(folder):
    """Make the held-out split a copy of the training split, so that it has several shards."""
    corpus = manifest.load_manifest(folder)
    copies = [dataclasses.replace(shard, file=f"copy-{shard.file}") for shard in corpus.train.shards]
    for shard, copy in zip(corpus.train.shards, copies, strict=True):
        shutil.copyfile(folder / shard.file, folder / copy.file)
    corpus = dataclasses.replace(corpus, validation=dataclasses.replace(corpus.train, shards=copies))
    (folder / manifest.MANIFEST_FILE).write_text(manifest.dump_manifest(corpus))
    return corpus


def test_held_out_rows_without_a_damaged_shard_are_the_same_on_all_ranks(sources):
    folder = manifest.Path(sources["a"])
    only_a = PhaseConfig("p", PHASE.tokens, 32, 8, 2, {"a": 1.0})
    corpus = hold_out_the_training_split(folder)
    first, second, *_ = corpus.validation.shards
    (folder / first.file).unlink()
    loaders = make_loaders(sources, make_schedule(only_a), 2, damaged_shards="skip")

    def read(rank, exchange):
        return read_skipping_damaged(
            lambda: list(loaders[rank].validation_batches(only_a, 64)),
            exchange,
            lambda met: loaders[rank].skip_shard(*met),
        )

    rows = np.concatenate([batch.tokens.numpy() for batches in run_in_threads(2, read) for batch in batches])
    assert second.tokens >= 64
    shard = (folder / second.file).read_bytes()[512 : 512 + 2 * 64]
    assert np.array_equal(rows.reshape(-1), np.frombuffer(shard, "<u2"))
    assert [each.skipped_shards for each in loaders] == [{"a": [first.file]}] * 2


@pytest.mark.parametrize("num_left", [1, 0])
def test_held_out_rows_are_those_that_damage_leaves_or_none(sources, num_left):
    """If evaluate.tokens needs all held-out rows, the run continues with the whole rows of the last shard."""
    folder, phase = manifest.Path(sources["a"]), dataclasses.replace(PHASE, mixture={"a": 1.0})
    corpus = hold_out_the_training_split(folder)
    asked = corpus.validation.tokens // 32 * 32
    one = make_loader({"a": sources["a"]}, make_schedule(phase), damaged_shards="skip")
    assert sum(len(batch.tokens) for batch in one.validation_batches(phase, asked)) * 32 == asked
    border = len(corpus.validation.shards) - num_left
    kept = corpus.validation.shards[border:]
    for shard in corpus.validation.shards[:border]:
        one._validation_readers["a"].stream.skip_shard(shard.file)
    rows = [batch.tokens.numpy() for batch in one.validation_batches(phase, asked)]
    assert sum(map(len, rows)) == sum(shard.tokens for shard in kept) // 32
    for shard in kept:
        ids = np.frombuffer((folder / shard.file).read_bytes()[512 : 512 + 2 * 512], "<u2")
        assert np.array_equal(np.concatenate(rows).reshape(-1)[:512], ids[: shard.tokens // 32 * 32])
    with pytest.raises(UserError, match=r"evaluate.tokens: .* lower evaluate.tokens"):
        one.validation_batches(phase, asked + 32)


def limited(sources, size=1, epochs=1.5, **fields):
    settings = {"max_epochs": {"b": epochs}, "damaged_shards": "skip", **BLOCKS, **fields}
    return make_loaders(sources, make_schedule(PHASE), size, **settings)


def test_a_schedule_that_reads_a_source_too_often_is_refused_at_the_start(sources):
    tokens = manifest.load_manifest(sources["b"]).train.tokens
    needed = PHASE.num_steps * 2 * 32
    epochs = (needed - 1) / tokens
    scheduled = rf"^data.max_epochs.b: the schedule reads {needed} tokens"
    message = rf"{scheduled}, but .* epochs of the {tokens} tokens in .* are only {needed - 1}; raise max_epochs"
    with pytest.raises(UserError, match=message) as refused:
        limited(sources, epochs=epochs)
    assert "\n" not in str(refused.value)
    [enough] = limited(sources, epochs=(needed + 0.5) / tokens)
    assert enough.find_end(0, None) == (PHASE.num_steps, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_at_the_end_of_a_source_all_ranks_stop_after_the_same_last_whole_step(sources, workers):
    """The tokens of "b" last for 5.5 steps, so the run ends after 5, and so does a resumed run."""
    step_tokens = 2 * 32
    epochs = 5.5 * step_tokens / manifest.load_manifest(sources["b"]).train.tokens
    loaders = limited(sources, 2, epochs, at_end="stop", num_workers=workers)
    assert {each.find_end(0, None) for each in loaders} == {(5, "b")}
    found, _, _ = skipping(loaders)
    assert len(found) == 5
    assert found == list(merged_steps(make_loaders(sources, make_schedule(PHASE), 1, **BLOCKS)))[:5]
    assert [each.find_end(3, found[2][2]) for each in loaders] == [(5, "b")] * 2
    assert list(merged_steps(loaders, 5, found[4][2])) == []
    assert [each.find_end(5, found[4][2]) for each in loaders] == [(5, "b")] * 2


def test_a_shard_left_out_takes_its_tokens_from_what_a_limited_source_can_feed(sources):
    """Each token is read once and no more, although one of two ranks finds a missing shard late in the run."""
    whole = TokenReader(sources["b"], "b", **BLOCKS)
    phase = PhaseConfig("p", 40 * 4 * 32, 32, 4, 1, {"b": 1.0})
    file = whole.files[whole.shard_position(whole.tokens * 2 // 3)[0]]
    (manifest.Path(sources["b"]) / file).unlink()
    settings = {"max_epochs": {"b": 1.0}, "at_end": "stop", "damaged_shards": "skip", **BLOCKS}
    loaders = make_loaders({"b": sources["b"]}, make_schedule(phase), 2, **settings)
    assert loaders[0].find_end(0, None)[0] == whole.tokens // phase.tokens_per_step
    found, _, left_out = skipping(loaders)
    kept = len(whole.positions_outside(0, whole.tokens, (file,)))
    assert len(found) == kept // phase.tokens_per_step < whole.tokens // phase.tokens_per_step
    assert left_out[0] == left_out[1]
    assert found[-1][2]["b"] <= whole.tokens


def test_where_a_source_that_ends_is_to_be_refused_it_is_when_a_shard_left_out_makes_it_end(sources):
    """The run raises at the step that found the shard, and at each resume that skips it. It does not end silently."""
    tokens = manifest.load_manifest(sources["b"]).train.tokens
    needed = PHASE.num_steps * 2 * 32
    [one] = limited(sources, epochs=(needed + 0.5) / tokens, at_end="refuse")
    batches = one.batches(0, None)
    cursor = next(batches).cursor
    batches.close()
    whole = TokenReader(sources["b"], "b", **BLOCKS)
    file = whole.files[whole.shard_position(needed - 1)[0]]
    lost = needed - cursor["b"] - len(whole.positions_outside(cursor["b"], needed, (file,)))
    one.skip_shard("b", file)
    scheduled = rf"^data.max_epochs.b: the schedule reads {needed} tokens"
    message = rf"{scheduled}, but .* are only {needed}, of which {lost} unread tokens are in damaged"
    for refused in (lambda: one.find_end(1, cursor), lambda: next(one.batches(1, cursor))):
        with pytest.raises(UserError, match=message) as said:
            refused()
        assert "\n" not in str(said.value)


def test_what_is_read_ahead_is_waited_for_unless_a_signal_has_come():
    seen = []

    def batches():
        try:
            yield
        except StopRequested:
            seen.append("not waited for")
            raise
        except GeneratorExit:
            seen.append("waited for")
            raise

    @contextmanager
    def signalled():
        raise StopRequested
        yield

    for reading in (nullcontext, signalled):
        next(begun := batches())
        close_prefetch(begun, reading)
        assert begun.gi_frame is None
    assert seen == ["waited for", "not waited for"]
