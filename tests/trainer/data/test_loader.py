import dataclasses
import inspect
import struct
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from xxhash import xxh3_64_intdigest

from tandem.trainer.config import PhaseConfig, UserError
from tandem.trainer.data import loader as loader_module
from tandem.trainer.data import manifest
from tandem.trainer.data import rows as rows_module
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.mixture import row_sources
from tandem.trainer.data.shard_content import check_documents, check_ids
from tandem.trainer.data.token_stream import TokenStream
from tests.trainer.data.loaders import TokenReader, make_loaders, make_schedule, merged_steps
from tests.trainer.data.loaders import make_loader as loader_of


@pytest.fixture
def sources(make_corpus):
    """Two corpora. The second is so small that the run below reads it several times."""
    return {"a": str(make_corpus("a", seed=1)), "b": str(make_corpus("b", seed=2, documents=12))}


SHORT = PhaseConfig("short", 6 * 8 * 32, 32, 8, 1, {"a": 0.7, "b": 0.3})
LONG = PhaseConfig("long", 6 * 4 * 128, 128, 4, 1, {"a": 0.4, "b": 0.6})
SCHEDULE = make_schedule(SHORT, LONG)
STEPS = SHORT.num_steps + LONG.num_steps


def loader(sources, *, schedule=SCHEDULE, **settings):
    return loader_of(sources, schedule, **settings)


def straight(sources, schedule=SCHEDULE, **settings):
    return list(merged_steps([loader(sources, schedule=schedule, **settings)]))


EVERY = (24, 4)
"""Rows and steps of each phase below. Every data-parallel size divides the rows."""


def phase_of(name, seq_len, mixture, *, rows=EVERY[0], num_steps=EVERY[1]):
    return PhaseConfig(name, num_steps * rows * seq_len, seq_len, rows, 1, mixture)


FIRST, SECOND = phase_of("first", 16, {"a": 0.7, "b": 0.3}), phase_of("second", 48, {"a": 0.4, "b": 0.6})
EDITED = [
    FIRST, dataclasses.replace(SECOND, tokens=SECOND.tokens_per_step),
    phase_of("edited", 48, {"a": 0.2, "b": 0.3, "c": 0.5}, num_steps=3), phase_of("back", 32, {"b": 1.0}),
]  # fmt: skip
"""After the first step of the second phase the mixture is edited: one source is added, then two are removed."""


@pytest.fixture
def three(sources, make_corpus):
    return sources | {"c": str(make_corpus("c", seed=3, documents=30))}


@pytest.mark.parametrize(
    "blocks", [{}, {"shuffle_block_tokens": 64, "shuffle_window_tokens": 256}], ids=["large", "small"]
)
def test_rows_of_steps_are_those_of_one_rank_for_every_dp_size_number_of_workers_and_resume(three, blocks):
    """The run includes phase changes, ends of epochs, an edit of the mixture, and resumes at other data-parallel sizes."""
    two = {name: three[name] for name in "ab"}
    before = straight(two, make_schedule(FIRST, SECOND), num_workers=0, **blocks)[:5]
    expected = [
        *before,
        *merged_steps([loader(three, schedule=make_schedule(*EDITED), num_workers=0, **blocks)], 5, before[-1][2]),
    ]
    assert len(expected) == 12
    assert expected[-1][2]["b"] > 2 * manifest.load_manifest(three["b"]).train.tokens, (
        "the run must pass ends of epochs"
    )
    sizes = (1, 2, 3, 4, 6, 8)
    for number, size in enumerate(sizes):
        for workers in range(4):
            old = make_loaders(two, make_schedule(FIRST, SECOND), size, num_workers=workers, **blocks)
            assert [found for found, _ in zip(merged_steps(old), range(4), strict=False)] == expected[:4], (
                size,
                workers,
            )
        other = make_loaders(two, make_schedule(FIRST, SECOND), sizes[number - 1], num_workers=number % 4, **blocks)
        assert next(merged_steps(other, 4, expected[3][2])) == expected[4]
        for step in (5, 8):
            new = make_loaders(
                three, make_schedule(*EDITED), sizes[number - step % 5], num_workers=(number + step) % 4, **blocks
            )
            assert list(merged_steps(new, step, expected[step - 1][2])) == expected[step:], (size, step)


def test_an_edit_of_the_mixture_loses_and_repeats_no_token_of_any_source(three):
    """The second phase is split by the edit. "c" is added there; "a" and "c" are then removed and added again."""
    last = phase_of("again", 16, {"a": 0.3, "b": 0.2, "c": 0.5})
    phases = [*EDITED, last]
    cursor = list(merged_steps([loader(three, schedule=make_schedule(FIRST, SECOND))]))[4][2]
    taken = {name: [] for name in three}
    for step, batch in enumerate(loader(three, schedule=make_schedule(*phases)).batches(0, None)):
        if step == 4:
            assert batch.cursor == cursor, "what was done stands"
        phase, number = next(
            (phase, step - first)
            for first, phase in zip((0, 4, 5, 8, 12), phases, strict=True)
            if step < first + phase.num_steps
        )
        for source, row in zip(
            row_sources(phase, number * phase.global_batch_size, phase.global_batch_size), batch.tokens, strict=True
        ):
            taken[source].append(row.numpy())
    for source, rows in taken.items():
        found = np.concatenate(rows)
        assert len(found) == batch.cursor[source]
        assert np.array_equal(found, TokenReader(three[source], source).token_ids(range(len(found)))), source


def test_the_evidence_of_a_step_is_what_its_rows_were_read_from(sources):
    blocks = {"shuffle_block_tokens": 48, "shuffle_window_tokens": 480}
    tokens = {name: TokenReader(folder, name, **blocks) for name, folder in sources.items()}
    position = dict.fromkeys(sources, 0)
    for number, (_, found, cursor) in zip(
        range(3), merged_steps(make_loaders(sources, SCHEDULE, 2, **blocks)), strict=False
    ):
        sums = [0, 0]
        for row, source in enumerate(row_sources(SHORT, number * SHORT.global_batch_size, SHORT.global_batch_size)):
            here = range(position[source], position[source] + SHORT.seq_len)
            places = [tokens[source].shard_position(each) for each in here]
            begins = [
                0,
                *(i for i, (one, two) in enumerate(pairwise(places), 1) if (one[0], one[1] + 1) != two),
                len(here),
            ]
            pieces = b"".join(struct.pack("<qqq", *places[i], j - i) for i, j in pairwise(begins))
            index = struct.pack("<q", row)
            sums[0] += xxh3_64_intdigest(index + source.encode() + b"\0" + pieces)
            sums[1] += xxh3_64_intdigest(index + tokens[source].token_ids(here).tobytes())
            position[source] = here.stop
        assert found == tuple(each % 2**64 for each in sums)
        assert cursor == position
    assert next(loader(sources).validation_batches(SHORT, 64)).digests is None


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (
            "tokens_and_targets[:, run.row_indices] = part.tokens_and_targets",
            "tokens_and_targets[:, run.row_indices] = part.tokens_and_targets[:, ::-1]",
        ),
        ("packed[:2] = tokens_and_targets", "packed[:2] = tokens_and_targets; packed[0, 0] = packed[0, -1]"),
    ],
    ids=["rows of a source swapped", "a row fed twice"],
)
def test_the_evidence_tells_a_batch_put_together_wrongly(sources, monkeypatch, right, wrong):
    """The digest hashes the tokens in the batch, not the tokens that were read for it."""
    said = next(loader(sources, num_workers=0).batches(0, None))
    source = inspect.getsource(rows_module)
    assert source.count(right) == 1
    made_wrong = dict(vars(rows_module))
    exec(compile(source.replace(right, wrong), "rows made wrong", "exec"), made_wrong)
    monkeypatch.setattr(loader_module, "build_batch", made_wrong["build_batch"])
    fed = next(loader(sources, num_workers=0).batches(0, None))
    assert not torch.equal(fed.tokens, said.tokens)
    assert fed.digests.ranges_digest == said.digests.ranges_digest
    assert fed.digests.tokens_digest != said.digests.tokens_digest


def test_no_token_is_lost_or_repeated_over_phase_change_and_epoch_end(sources):
    taken = {"a": [], "b": []}
    one = loader(sources)
    last = {}
    for step, batch in enumerate(one.batches(0, None)):
        phase, number = (SHORT, step) if step < SHORT.num_steps else (LONG, step - SHORT.num_steps)
        for source, row, target in zip(
            row_sources(phase, number * phase.global_batch_size, phase.global_batch_size),
            batch.tokens,
            batch.targets,
            strict=True,
        ):
            taken[source].append(row.numpy())
            assert torch.equal(row[1:], target[:-1])
            assert last.get(source, row[0]) == row[0], "a row's last target is the next row's first token"
            last[source] = target[-1]
        assert {source: sum(map(len, rows)) for source, rows in taken.items()} == batch.cursor
    for source, rows in taken.items():
        corpus = manifest.load_manifest(sources[source])
        stream = TokenStream(sources[source], corpus, corpus.train, source=source, seed=0)
        windows = np.concatenate(rows)
        assert np.array_equal(windows, stream.read_tokens(0, len(windows)))


def test_documents_count_from_0_in_each_row_and_eos_belongs_to_the_document_it_ends(sources):
    for batch in loader(sources).batches(0, None):
        for row, documents in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
            index = 0
            for token, document in zip(row, documents, strict=True):
                assert document == index
                index += token == 0


def test_a_token_behind_the_border_of_a_block_is_of_another_document(sources):
    blocks = {"shuffle_block_tokens": 48, "shuffle_window_tokens": 480}
    tokens, position, borders = TokenReader(sources["a"], "a", **blocks), 0, 0
    only_a = dataclasses.replace(SHORT, mixture={"a": 1.0})
    for batch in loader(sources, schedule=make_schedule(only_a), **blocks).batches(0, None):
        for ids, documents in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
            where = [tokens.order.stream_ranges(each, 1)[0][0] for each in range(position, position + only_a.seq_len)]
            index, expected = 0, [0]
            for i in range(1, len(ids)):
                border = where[i] != where[i - 1] + 1
                borders += border and ids[i - 1] != 0
                index += border or ids[i - 1] == 0
                expected.append(index)
            assert documents == expected
            position += only_a.seq_len
    assert borders > 5


def test_a_resume_at_any_cursor_goes_on_as_if_never_stopped(sources):
    expected = straight(sources)
    for step in (1, 5, 6, 7, 11):
        assert list(merged_steps(make_loaders(sources, SCHEDULE, 2), step, expected[step - 1][2])) == expected[step:]
        assert list(merged_steps([loader(sources)], step)) == expected[step:], (
            "without a cursor the schedule implies it"
        )
    assert list(loader(sources).batches(STEPS, expected[-1][2])) == []


def test_reading_ahead_changes_nothing(sources):
    expected = straight(sources, num_workers=0)
    for workers, prefetch_steps in ((1, 0), (1, 1), (3, 2), (2, 99)):
        assert straight(sources, num_workers=workers, prefetch_steps=prefetch_steps) == expected


def test_the_seed_changes_the_order(sources):
    assert straight(sources, seed=0) != straight(sources, seed=1)


def test_ids_are_64_bit_and_documents_32(sources):
    batch = next(loader(sources).batches(0, None))
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert batch.tokens.is_contiguous()
    assert batch.targets.is_contiguous()


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data_")]


def test_leaving_early_ends_the_threads(sources):
    batches = loader(sources, num_workers=2, prefetch_steps=2).batches(0, None)
    next(batches)
    assert len(reading_threads()) == 2
    batches.close()
    assert not reading_threads()


def test_at_most_prefetch_steps_are_read_ahead(sources):
    """The loader plans each step once, just before it is read, so the plans count the steps read so far."""
    one, cut = loader(sources, num_workers=1, prefetch_steps=3), []
    places = one._plan_batch
    one._plan_batch = lambda *place: cut.append(place) or places(*place)
    batches = one.batches(0, None)
    for taken in range(1, 5):
        next(batches)
        assert len(cut) == taken + 3
    batches.close()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_flipped_byte_stops_the_run_with_the_shard_named(sources, make_corpus, prefetch_steps):
    folder = make_corpus("c", documents=200)
    shard = folder / manifest.load_manifest(folder).train.shards[3].file
    content = bytearray(shard.read_bytes())
    content[600] ^= 4
    shard.write_bytes(content)
    schedule = make_schedule(PhaseConfig("p", 80 * 128, 128, 8, 1, {"c": 1.0}))
    one = loader({"c": str(folder)}, schedule=schedule, prefetch_steps=prefetch_steps)
    with pytest.raises(UserError, match=rf"{shard.name}: the shard is damaged: its xxh3_128 is "):
        list(one.batches(0, None))
    assert not reading_threads()


def test_validation_rows_are_the_same_for_every_dp_size_and_in_chunks(sources):
    phase = dataclasses.replace(SHORT, micro_batch_size=2)
    whole = torch.cat([batch.tokens for batch in loader(sources).validation_batches(phase, 7 * 32)])
    assert whole.shape == (7, 32)
    for rank in range(2):
        one = loader(sources, dp_rank=rank, dp_size=2)
        for _ in range(2):
            chunks = list(one.validation_batches(phase, 7 * 32))
            assert [len(batch.tokens) for batch in chunks] == ([2, 2] if rank == 0 else [2, 1])
            assert torch.equal(torch.cat([batch.tokens for batch in chunks]), whole[rank::2])


def test_validation_tokens_are_held_out(sources):
    only_a = dataclasses.replace(SHORT, mixture={"a": 1.0})
    read = torch.cat([batch.tokens for batch in loader(sources).validation_batches(only_a, 128)]).flatten()
    corpus = manifest.load_manifest(sources["a"])
    held_out = TokenStream(sources["a"], corpus, corpus.validation, source="a", seed=None).read_tokens(0, 128)
    assert read.tolist() == held_out.tolist()


def test_more_validation_tokens_than_there_are_is_refused_at_the_call(sources):
    with pytest.raises(
        UserError, match=r"evaluate.tokens: 99968 needs \d+ held-out tokens of .* lower evaluate.tokens"
    ):
        loader(sources).validation_batches(SHORT, 99_968)


def rewrite(folder, **changes):
    corpus = dataclasses.replace(manifest.load_manifest(folder), **changes)
    with open(f"{folder}/{manifest.MANIFEST_FILE}", "w") as file:
        file.write(manifest.dump_manifest(corpus))


@pytest.mark.parametrize("vocab", [500, 70_000], ids=["uint16", "uint32"])
@pytest.mark.parametrize("settings", [{"prefetch_steps": 0}, {"damaged_shards": "skip"}], ids=str)
def test_an_id_beyond_the_vocabulary_stops_the_run(make_corpus, vocab, settings):
    """The model would train on it silently: with tensor parallelism no rank owns it. It is no damage that may be skipped."""
    folder = make_corpus("a", vocab=vocab)
    phase = PhaseConfig("short", 6 * 8 * 32, 32, 8, 1, {"a": 1.0})
    one = loader({"a": str(folder)}, schedule=make_schedule(phase), vocab_size=vocab, **settings)
    largest = max(int(batch.packed[:2].max()) for batch in one.batches(0, None))
    rewrite(folder, vocab=largest)
    one = loader({"a": str(folder)}, schedule=make_schedule(phase), vocab_size=vocab, **settings)
    message = rf"train-\d+.tar: contains id \d+, but manifest.json states vocab {largest}, ids 0 to {largest - 1}; .*written so"
    with pytest.raises(UserError, match=message) as refused:
        list(one.batches(0, None))
    assert not isinstance(refused.value, DamagedShard)
    rewrite(folder, vocab=largest // 2 if vocab == 500 else 66_000)
    one = loader({"a": str(folder)}, schedule=make_schedule(phase), vocab_size=vocab, **settings)
    with pytest.raises(UserError, match=r"validation-\d+.tar: contains id"):
        list(one.validation_batches(phase, 128))


def test_every_token_of_a_shard_is_checked_and_no_header(make_corpus):
    folder = make_corpus("a")
    corpus = manifest.load_manifest(folder)
    for shard in corpus.train.shards:
        tar = np.fromfile(folder / shard.file, np.uint16)  # its headers are ASCII: numbers far above the ids
        check_ids(tar, folder, shard, corpus)
        check_documents(tar, folder, shard, corpus)
        header, rest = 256, shard.tokens % 512
        for index in (header, header + 511, 2 * header + 512, 2 * header + 512 + rest - 1):
            changed = tar.copy()
            changed[index] = 500
            with pytest.raises(UserError, match="contains id 500"):
                check_ids(changed, folder, shard, corpus)
        changed[index] = 1
        with pytest.raises(UserError, match="ends of documents"):
            check_documents(changed, folder, shard, corpus)


def test_corpora_that_do_not_fit_are_refused_at_the_start(sources, make_corpus, tmp_path):
    with pytest.raises(
        UserError,
        match=r"model.vocab_size: 499 is too small for the tokenizer of data.sources.a; .* at least 500, its number of ids",
    ):
        loader(sources, vocab_size=499)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer: .* has sha256"):
        loader(sources, tokenizer=str(tmp_path / "tokenizer.json"))
    other = make_corpus("other", tokenizer="2" * 64)
    with pytest.raises(
        UserError, match=r"data.sources.x: was prepared with tokenizer 222222222222.*share one tokenizer"
    ):
        loader({**sources, "x": str(other)})
    with pytest.raises(UserError, match=r"nowhere/manifest.json: no such file"):
        loader({"a": "nowhere"})
    rewrite(sources["b"], eos_id=500)
    with pytest.raises(UserError, match=r"manifest.json: states impossible counts: eos_id 500 is not below vocab 500"):
        loader(sources)


def test_one_corpus_under_two_names_is_refused_at_the_start_and_at_a_resume(sources):
    with pytest.raises(UserError, match=r"^data.sources.again: is the same corpus as b, .*remove again") as refused:
        loader({**sources, "again": sources["b"]})
    assert "\n" not in str(refused.value)
    saved = loader(sources).fingerprints
    only_a = make_schedule(dataclasses.replace(SHORT, mixture={"a": 1.0}))
    renamed = loader({"a": sources["a"], "again": sources["b"]}, schedule=only_a).fingerprints
    with pytest.raises(UserError, match=r"^data.sources.again: the run has read this corpus under another name"):
        manifest.check_fingerprints(saved, renamed)


def test_a_missing_shard_is_named_at_the_start(sources, tmp_path):
    (tmp_path / "a" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar: the shard is missing.*, or set data.damaged_shards=skip"):
        loader(sources)


def test_fingerprints_tell_corpora_apart(sources):
    fingerprints = loader(sources).fingerprints
    assert fingerprints == {name: manifest.load_manifest(folder).fingerprint for name, folder in sources.items()}
    assert fingerprints["a"] != fingerprints["b"]
