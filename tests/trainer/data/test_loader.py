import dataclasses
import hashlib
import threading

import numpy as np
import pytest
import torch

from trainer.config import Data, Linear, Phase, Schedule, UserError
from trainer.data import manifest
from trainer.data.loader import Loader
from trainer.data.mixture import row_sources
from trainer.data.stream import Stream

VOCAB = 512


@pytest.fixture
def sources(make_corpus):
    """Two corpora, the second so small that the run below passes several ends of its epoch."""
    return {"a": str(make_corpus("a", seed=1)), "b": str(make_corpus("b", seed=2, documents=12))}


def schedule_of(*phases):
    return Schedule(None, list(phases), Linear("linear", 1.0, 0.0, 1, None))


SHORT = Phase("short", 6 * 8 * 32, 32, 8, 1, {"a": 0.7, "b": 0.3})
LONG = Phase("long", 6 * 4 * 128, 128, 4, 1, {"a": 0.4, "b": 0.6})
SCHEDULE = schedule_of(SHORT, LONG)
STEPS = SHORT.steps + LONG.steps


def loader(sources, *, schedule=SCHEDULE, seed=0, vocab=VOCAB, rank=0, size=1, **fields):
    return Loader(Data(sources, **fields), schedule, seed=seed, vocab=vocab, dp_rank=rank, dp_size=size)


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def hashes(loaders, step=0, cursor=None):
    """Per step: hash of the global batch put together from all ranks, and the cursor they agree on."""
    for batches in zip(*(each.batches(step, cursor) for each in loaders), strict=True):
        assert all(batch.cursor == batches[0].cursor for batch in batches)
        fields = (getattr(batch, name) for name in ("tokens", "targets", "documents") for batch in batches)
        yield digest(fields), batches[0].cursor


def straight(sources, **settings):
    return list(hashes([loader(sources, **settings)]))


def test_every_dp_size_sees_the_same_global_batches_over_a_phase_change_and_epoch_ends(sources):
    expected = straight(sources)
    assert len(expected) == STEPS
    epoch = manifest.load(sources["b"]).train.tokens
    assert expected[-1][1]["b"] > 2 * epoch, "the run must pass the end of an epoch"
    for size in (2, 4):
        ranks = [loader(sources, rank=rank, size=size) for rank in range(size)]
        assert list(hashes(ranks)) == expected


def test_no_token_is_lost_or_repeated_over_phase_change_and_epoch_end(sources):
    taken = {"a": [], "b": []}
    one = loader(sources)
    last = {}
    for step, batch in enumerate(one.batches(0, None)):
        phase, number = (SHORT, step) if step < SHORT.steps else (LONG, step - SHORT.steps)
        for source, row, target in zip(
            row_sources(phase, number * phase.rows, phase.rows), batch.tokens, batch.targets, strict=True
        ):
            taken[source].append(row.numpy())
            assert torch.equal(row[1:], target[:-1])
            assert last.get(source, row[0]) == row[0], "a row's last target is the next row's first token"
            last[source] = target[-1]
        assert {source: sum(map(len, rows)) for source, rows in taken.items()} == batch.cursor
    for source, rows in taken.items():
        corpus = manifest.load(sources[source])
        stream = Stream(sources[source], corpus, corpus.train, name=source, seed=0)
        windows = np.concatenate(rows)
        assert np.array_equal(windows, stream.read(0, len(windows)))


def test_documents_count_from_0_in_each_row_and_eos_belongs_to_the_document_it_ends(sources):
    for batch in loader(sources).batches(0, None):
        for row, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
            index = 0
            for token, document in zip(row, documents, strict=True):
                assert document == index
                index += token == 0


def test_a_resume_at_any_cursor_goes_on_as_if_never_stopped(sources):
    expected = straight(sources)
    for step in (1, 5, 6, 7, 11):
        resumed = [loader(sources, rank=rank, size=2) for rank in range(2)]
        assert list(hashes(resumed, step, expected[step - 1][1])) == expected[step:]
        assert straight_from(sources, step) == expected[step:], "without a cursor the schedule implies it"
    assert list(loader(sources).batches(STEPS, expected[-1][1])) == []


def straight_from(sources, step):
    return list(hashes([loader(sources)], step, None))


def test_prefetch_changes_nothing(sources):
    assert (
        straight(sources, prefetch_steps=0)
        == straight(sources, prefetch_steps=1)
        == straight(sources, prefetch_steps=9)
    )


def test_the_seed_changes_the_order(sources):
    assert straight(sources, seed=0) != straight(sources, seed=1)


def test_ids_are_64_bit_and_documents_32(sources):
    batch = next(loader(sources).batches(0, None))
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.documents.dtype == torch.int32
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_leaving_early_ends_the_thread(sources):
    batches = loader(sources, prefetch_steps=1).batches(0, None)
    next(batches)
    assert prefetch_threads()
    batches.close()
    assert not prefetch_threads()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_flipped_byte_stops_the_run_with_the_shard_named(sources, make_corpus, prefetch_steps):
    folder = make_corpus("c", documents=200)
    shard = folder / manifest.load(folder).train.shards[3].file
    content = bytearray(shard.read_bytes())
    content[600] ^= 4
    shard.write_bytes(content)
    schedule = schedule_of(Phase("p", 80 * 128, 128, 8, 1, {"c": 1.0}))
    one = loader({"c": str(folder)}, schedule=schedule, prefetch_steps=prefetch_steps)
    with pytest.raises(UserError, match=rf"{shard.name}: sha256 .*the shard is damaged"):
        list(one.batches(0, None))
    assert not prefetch_threads()


def test_validation_rows_are_the_same_for_every_dp_size_and_in_chunks(sources):
    phase = dataclasses.replace(SHORT, micro_rows=2)
    whole = torch.cat([batch.tokens for batch in loader(sources).validation(phase, 7 * 32)])
    assert whole.shape == (7, 32)
    for rank in range(2):
        one = loader(sources, rank=rank, size=2)
        for _ in range(2):
            chunks = list(one.validation(phase, 7 * 32))
            assert [len(batch.tokens) for batch in chunks] == ([2, 2] if rank == 0 else [2, 1])
            assert torch.equal(torch.cat([batch.tokens for batch in chunks]), whole[rank::2])


def test_validation_tokens_are_held_out(sources):
    only_a = dataclasses.replace(SHORT, mixture={"a": 1.0})
    read = torch.cat([batch.tokens for batch in loader(sources).validation(only_a, 128)]).flatten()
    corpus = manifest.load(sources["a"])
    held_out = Stream(sources["a"], corpus, corpus.validation, name="a", seed=None).read(0, 128)
    assert read.tolist() == held_out.tolist()


def test_more_validation_tokens_than_there_are_is_refused_at_the_call(sources):
    with pytest.raises(UserError, match=r"evaluate.tokens: 99968 takes \d+ held-out tokens of .* lower it"):
        loader(sources).validation(SHORT, 99_968)


def rewrite(folder, **changes):
    corpus = dataclasses.replace(manifest.load(folder), **changes)
    with open(f"{folder}/{manifest.FILE}", "w") as file:
        file.write(manifest.dump(corpus))


def test_corpora_that_do_not_fit_are_refused_at_the_start(sources, make_corpus, tmp_path):
    with pytest.raises(UserError, match=r"model.vocab: 499; the tokenizer of data.sources.a has 500"):
        loader(sources, vocab=499)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer: .* has sha256"):
        loader(sources, tokenizer=str(tmp_path / "tokenizer.json"))
    other = make_corpus("other", tokenizer="two")
    with pytest.raises(UserError, match=r"data.sources.x: prepared with tokenizer two.*share one tokenizer"):
        loader({**sources, "x": str(other)})
    with pytest.raises(UserError, match=r"nowhere/manifest.json: no such file"):
        loader({"a": "nowhere"})
    rewrite(sources["b"], eos_id=500)
    with pytest.raises(UserError, match=r"data.sources.b: EOS '<eos>' has id 500, outside"):
        loader(sources)


def test_a_missing_shard_is_named_at_the_start(sources, tmp_path):
    (tmp_path / "a" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar: shard is missing"):
        loader(sources)


def test_fingerprints_tell_corpora_apart(sources):
    fingerprints = loader(sources).fingerprints
    assert fingerprints == {name: manifest.load(folder).fingerprint for name, folder in sources.items()}
    assert fingerprints["a"] != fingerprints["b"]
