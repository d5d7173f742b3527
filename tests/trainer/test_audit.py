"""An audit passes what real loaders wrote, and names what is wrong with it, be it in the ledger or in the reading."""

import dataclasses
import hashlib
import json
import random
import shutil
import struct
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xxhash

from data_prep.write import write_split
from trainer import audit
from trainer.audit import coverage, feed, replay
from trainer.audit.coverage import Coverage
from trainer.audit.expansion import Expansion, Pieces, rows
from trainer.audit.history import History
from trainer.audit.verdict import Finding, Verdict
from trainer.config import Data, Linear, Phase, Schedule, UserError
from trainer.data import manifest, mixture
from trainer.data.loader import Loader
from trainer.data.manifest import DamagedShard, Manifest, Shard, Split
from trainer.data.mixture import row_sources
from trainer.data.order import Order
from trainer.data.stream import Stream
from trainer.disk import write_whole
from trainer.ledger import FILE, Digests, Ledger, copy_manifests, halves, joined, manifest_copy

SEED, BLOCK, WINDOW = 3, 64, 320
SHORT = Phase("short", 6 * 12 * 32, 32, 12, 1, {"a": 0.7, "b": 0.3})
LONG = Phase("long", 6 * 6 * 128, 128, 6, 1, {"a": 0.4, "b": 0.6})
ADDED = Phase("edited", 4 * 6 * 64, 64, 6, 1, {"a": 0.25, "b": 0.25, "c": 0.5})
EDITED = [SHORT, dataclasses.replace(LONG, tokens=3 * 6 * 128), ADDED]
"""The schedule after a person has cut the second phase short and added a third, with a new source."""
STEPS = 13


def make_corpus(folder: Path, seed: int, documents: int) -> str:
    """Random documents in small shards, by the real writer."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    texts = (np.append(draw.integers(1, 500, draw.integers(0, 90)), 0).astype(np.uint16) for _ in range(documents))
    train = write_split(folder, "train", texts, sample_tokens=512, shard_tokens=600)
    written = Manifest("uint16", 512, 500, "<eos>", 0, "one", 0.0, {}, {}, train=train, validation=Split(0, 0, []))
    write_whole(folder / manifest.FILE, manifest.dump(written))
    return str(folder)


def loaders(sources: dict[str, str], phases: list[Phase], dp_size: int) -> list[Loader]:
    schedule = Schedule(None, phases, Linear("linear", 1.0, 0.0, 1, None))
    data = Data(sources, block_tokens=BLOCK, window_tokens=WINDOW, workers=0)
    return [Loader(data, schedule, seed=SEED, vocab=512, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]


class Saved(NamedTuple):
    """What a checkpoint keeps for the next start."""

    step: int = 0
    cursor: dict[str, int] = {}  # noqa: RUF012
    after: int = 0
    skipped: dict[str, list[str]] = {}  # noqa: RUF012


NOTHING = Saved()


def train(folder: Path, sources: dict, phases: list[Phase], saved: Saved, until: int, dp_size: int, skip=None) -> Saved:
    """The ledger has what a run of these ranks writes from a checkpoint up to step `until`; returns the checkpoint there."""
    ranks, cursor = loaders(sources, phases, dp_size), saved.cursor
    for loader in ranks:
        for each in [(source, file) for source, files in saved.skipped.items() for file in files]:
            loader.skip(*each)
    ledger = Ledger(folder)
    fingerprints = ranks[0].fingerprints
    ledger.start(
        saved.step, cursor, order=ranks[0].order, phases=[dataclasses.asdict(phase) for phase in phases],
        fingerprints=fingerprints, skipped=ranks[0].skipped, dp_size=dp_size, after=saved.after,
    )  # fmt: skip
    if skip:
        ledger.skip(saved.step + 1, *skip)
        for loader in ranks:
            loader.skip(*skip)
    readers = [loader.batches(saved.step, cursor or None) for loader in ranks]
    for step in range(saved.step, until):
        batches = [next(reader) for reader in readers]
        summed = [sum(parts) for parts in zip(*(halves(batch.evidence) for batch in batches), strict=True)]
        cursor = batches[0].cursor
        ledger.step(step + 1, cursor, joined(summed, tp_size=1))
    for reader in readers:
        reader.close()
    after = ledger.sync()
    ledger.close()
    copy_manifests(folder, ranks[0].manifests)
    return Saved(until, cursor, after, ranks[0].skipped)


def run_all(folder: Path, sources: dict) -> None:
    """A run with everything in it: dp 1, 2 and 3, a rollback, phases, an end of an epoch, a mixture edit, a new source."""
    two = {name: sources[name] for name in "ab"}
    folder.mkdir()
    at_3 = train(folder, two, [SHORT, LONG], NOTHING, 3, 1)
    train(folder, two, [SHORT, LONG], at_3, 5, 1)
    at_7 = train(folder, two, [SHORT, LONG], at_3, 7, 2)
    train(folder, sources, EDITED, at_7, STEPS, 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: make_corpus(root / name, seed, documents)
        for name, seed, documents in (("a", 1, 90), ("b", 2, 16), ("c", 3, 40))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sources) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_all(folder, sources)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of the run to be spoilt."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def audited(folder: Path, tokens=None) -> Verdict:
    history = History(folder)
    manifests = audit.copies(folder, history)
    corpora = audit.corpora_of(history, manifests)
    fingerprints = {source: corpus.fingerprint for source, corpus in manifests.items()}
    return replay.Replay(history, corpora, fingerprints, tokens and tokens(manifests, history.left_out)).run()


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def write(folder: Path, lines: list[dict]) -> None:
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def line_of(lines: list[dict], step: int) -> dict:
    """The last one of the step."""
    return next(line for line in reversed(lines) if line["kind"] == "step" and line["step"] == step)


def findings(folder: Path) -> list[Finding]:
    return audited(folder).findings


class Reading:
    """What the rows of a step are to read, said once more and slowly: token by token."""

    def __init__(self, folder: Path, step: int):
        self.step, self._folder = step, folder
        lines = lines_of(folder)
        self.line = line_of(lines, step)
        start = [line for line in lines if line["kind"] == "start"][-1]
        first = 1
        for phase in (Phase(**phase) for phase in start["phases"]):
            if step < first + phase.steps:
                break
            first += phase.steps
        self.phase = phase
        self.sources = row_sources(phase, (step - first) * phase.rows, phase.rows)
        self.positions, at = [], {source: before for source, (before, _) in self.line["taken"].items()}
        for source in self.sources:
            self.positions.append(at[source])
            at[source] += phase.seq_len

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        return pieces_of(self._folder, self.sources[row], self.positions[row], self.phase.seq_len)

    def shards(self, row: int) -> list[str]:
        files = [shard.file for shard in split_of(self._folder, self.sources[row]).shards]
        return [f"{files[shard]}:{first}+{tokens}" for shard, first, tokens in self.pieces(row)]

    def hash(self, number: int, row: int) -> int:
        """Of row `number` if it read what `row` is for."""
        packed = b"".join(struct.pack("<qqq", *piece) for piece in self.pieces(row))
        return xxhash.xxh3_64(struct.pack("<q", number) + self.sources[row].encode() + b"\0" + packed).intdigest()


def split_of(folder: Path, source: str) -> Split:
    path = manifest_copy(folder, source)
    return manifest.parsed(path.read_bytes(), path).train


def pieces_of(folder: Path, source: str, position: int, count: int) -> list[tuple[int, int, int]]:
    split = split_of(folder, source)
    order = Order(split.tokens, block_tokens=BLOCK, window_tokens=WINDOW, name=source, seed=SEED)
    return shard_pieces(
        split, source, [start + place for start, taken in order.runs(position, count) for place in range(taken)]
    )


def shard_pieces(split: Split, source: str, stream: list[int]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for token in stream:
        epoch, offset = divmod(token, split.tokens)
        order = sorted(
            range(len(split.shards)),
            key=lambda index: hashlib.sha256(f"{SEED}/{source}/{epoch}/{index}".encode()).digest(),
        )
        starts = [0, *accumulate(split.shards[index].tokens for index in order)]
        place = bisect_right(starts, offset) - 1
        shard, first = order[place], offset - starts[place]
        if found and found[-1][0] == shard and sum(found[-1][1:]) == first:
            found[-1] = (shard, found[-1][1], found[-1][2] + 1)
        else:
            found.append((shard, first, 1))
    return found


# What is right


@pytest.mark.parametrize("chunk_rows", [1, replay.CHUNK_ROWS])
def test_a_run_over_every_kind_of_change_is_proven_and_its_history_told(whole, sources, monkeypatch, chunk_rows):
    monkeypatch.setattr(replay, "CHUNK_ROWS", chunk_rows)
    verdict = audited(whole)
    assert verdict.findings == []
    assert verdict.steps == STEPS
    notes = "\n".join(verdict.notes)
    assert "step 3: restart, dp 2; takes back steps 4 to 5: 2 made and thrown away, 768 tokens; dp was 1" in notes
    assert "step 7: restart, dp 3; dp was 2; phase long: tokens 4608 -> 2304; phase edited added" in notes
    assert "source c added" in notes
    assert "step 7: phase long, 6 rows of 128 tokens" in notes
    end = lines_of(whole)[-1]["taken"]
    for source, standing in verdict.sources.items():
        assert standing.tokens == standing.cursor == end[source][1]
        assert (standing.lost_tokens, standing.repeated_tokens) == (0, 0)
        assert standing.next == next_token(whole, source, standing.cursor)
    assert verdict.sources["b"].cursor > verdict.sources["b"].epoch_tokens, "the run must pass the end of an epoch"
    assert sum(standing.tokens for standing in verdict.sources.values()) == sum(phase.tokens for phase in EDITED)


def next_token(folder: Path, source: str, position: int) -> str:
    [(shard, first, _)] = pieces_of(folder, source, position, 1)
    return f"{split_of(folder, source).shards[shard].file}:{first}"


def test_the_bytes_of_the_shards_are_compared_by_a_reader_of_its_own(whole, sources, monkeypatch, tmp_path):
    reader = reader_over(sources)
    verdict = audited(whole, reader)
    assert verdict.findings == []
    assert verdict.checked_tokens
    sliced = Stream._slices

    def wrong(self, index, start, count):
        found = sliced(self, index, start, count)
        return [found[0] ^ 1, *found[1:]] if index == 5 and start == 0 else found

    monkeypatch.setattr(Stream, "_slices", wrong)
    run_all(tmp_path / "run", sources)
    assert findings(tmp_path / "run") == [], "the ranges are right"
    found = audited(tmp_path / "run", reader).findings
    assert found
    assert all("was fed other tokens than its ranges hold" in finding.says for finding in found)
    assert all(any("train-000005.tar:0+" in shard for shard in finding.shards) for finding in found)


def reader_over(sources):
    from trainer.audit.tokens import TarReader
    from trainer.config import Cache as Settings
    from trainer.data.cache import Cache

    return lambda manifests, left_out: TarReader(sources, manifests, Cache(Settings()), left_out)


def test_a_torn_last_line_is_told_and_no_mistake(folder):
    with (folder / FILE).open("ab") as file:
        file.write(b'{"kind":"step","step":14,"tak')
    verdict = audited(folder)
    assert verdict.proven
    assert "the last line is torn" in verdict.notes[-1]


def test_a_shard_left_out_is_named_and_its_tokens_are_no_loss(tmp_path, sources):
    file = manifest.load(sources["b"]).train.shards[1]
    two = {name: sources[name] for name in "ab"}
    at_3 = train(tmp_path, two, [SHORT, LONG], NOTHING, 3, 1)
    train(tmp_path, two, [SHORT, LONG], at_3, 12, 3, skip=("b", file.file))
    verdict = audited(tmp_path)
    assert verdict.findings == []
    standing = verdict.sources["b"]
    assert standing.cursor > 2 * standing.epoch_tokens
    assert set(standing.passed_over) == {file.file}
    assert standing.passed_over[file.file] >= file.tokens
    assert standing.tokens + standing.passed_over[file.file] == standing.cursor
    lines = lines_of(tmp_path)
    write(tmp_path, [line for line in lines if line["kind"] != "skip"])
    assert not audited(tmp_path).proven, "who says nothing of it has read other rows than the ledger says"


def test_a_shard_left_out_stays_so_over_a_restart(tmp_path, sources):
    file, two = manifest.load(sources["b"]).train.shards[1].file, {name: sources[name] for name in "ab"}
    at_3 = train(tmp_path, two, [SHORT, LONG], NOTHING, 3, 1)
    at_5 = train(tmp_path, two, [SHORT, LONG], at_3, 5, 1, skip=("b", file))
    train(tmp_path, two, [SHORT, LONG], at_5, 12, 2)
    verdict = audited(tmp_path)
    assert verdict.findings == []
    assert verdict.sources["b"].passed_over[file] > 0


def test_a_shard_is_read_again_after_a_rollback_to_before_it_was_left_out(tmp_path, sources):
    file, two = manifest.load(sources["b"]).train.shards[1].file, {name: sources[name] for name in "ab"}
    at_3 = train(tmp_path, two, [SHORT, LONG], NOTHING, 3, 1)
    at_5 = train(tmp_path, two, [SHORT, LONG], at_3, 5, 1, skip=("b", file))
    train(tmp_path, two, [SHORT, LONG], at_3, 12, 2)
    verdict = audited(tmp_path)
    assert verdict.findings == []
    assert verdict.sources["b"].passed_over == {}
    train(tmp_path, two, [SHORT, LONG], at_5._replace(skipped={}), 12, 2)
    [found] = findings(tmp_path)
    assert f"leaves out other shards than the run: {file} of b" in found.says, "and the steps after it are as it says"


def test_a_run_may_go_back_to_steps_that_it_had_taken_back(tmp_path, sources):
    """The checkpoint of step 8 could not be read for a while."""
    two = {name: sources[name] for name in "ab"}
    at_8 = train(tmp_path, two, [SHORT, LONG], NOTHING, 8, 1)
    reached = {source: line_of(lines_of(tmp_path), 4)["taken"][source][1] for source in two}
    train(tmp_path, two, [SHORT, LONG], Saved(4, reached, after=5), 6, 2)
    end = train(tmp_path, two, [SHORT, LONG], at_8, 10, 2)
    verdict = audited(tmp_path)
    assert verdict.findings == []
    assert {source: standing.tokens for source, standing in verdict.sources.items()} == end.cursor
    assert "step 8: restart, dp 2; takes back steps 5 to 6: 2 made and thrown away" in "\n".join(verdict.notes)


def test_a_source_never_read_may_become_another_corpus(tmp_path, sources):
    two, other = {name: sources[name] for name in "ab"}, make_corpus(tmp_path / "other", 4, 40)
    run = tmp_path / "run"
    run.mkdir()
    at_3 = train(run, sources, [SHORT, LONG], NOTHING, 3, 1)
    at_7 = train(run, two, EDITED[:2], at_3, 7, 1)
    at_11 = train(run, two | {"c": other}, EDITED, at_7, 11, 1)
    assert findings(run) == []
    train(run, sources, EDITED, at_11, 12, 1)
    assert {(found.kind, found.source) for found in findings(run)} >= {("changed", "c")}, (
        "but one that was read may not"
    )


def test_a_damaged_shard_that_was_left_out_later_is_no_hindrance_to_comparing_the_others(tmp_path, sources):
    run, mine = tmp_path / "run", {name: shutil.copytree(sources[name], tmp_path / name) for name in "ab"}
    mine = {name: str(copy) for name, copy in mine.items()}
    run.mkdir()
    at_3 = train(run, mine, [SHORT, LONG], NOTHING, 3, 1)
    [(shard, _, _), *_] = pieces_of(run, "b", 0, 1)
    file = split_of(run, "b").shards[shard].file
    tokens = sum(count for index, _, count in pieces_of(run, "b", 0, at_3.cursor["b"]) if index == shard)
    train(run, mine, [SHORT, LONG], at_3, 12, 1, skip=("b", file))
    for name in "ab":
        with (Path(mine[name]) / file).open("r+b") as damaged:
            damaged.truncate(700)
        if name == "a":
            with pytest.raises(DamagedShard, match=file):
                audited(run, reader_over(mine))
            shutil.copy(f"{sources[name]}/{file}", f"{mine[name]}/{file}")
    verdict = audited(run, reader_over(mine))
    assert verdict.findings == []
    [note] = [note for note in verdict.notes if "cannot be read again" in note]
    assert f"b leaves out {file}; its {tokens} tokens taken before" in note
    lines = lines_of(run)
    line_of(lines, 12)["tokens"] = "0" * 16
    write(run, lines)
    assert [found.step for found in audited(run, reader_over(mine)).findings] == [12]


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


# What is wrong with the reading: one function of the loader misleads it, and the ledger says what was really read


def read_elsewhere(monkeypatch, source: str, moves: list[tuple[int, int, int]]) -> None:
    """From here on places [start, end) of the source are read as those from `target` on, for each (start, end, target)."""
    right = Order.runs

    def runs(self, position, count):
        if self._name != source or self._seed is None:
            return right(self, position, count)
        found = []
        while count:
            borders = [border for start, end, _ in moves for border in (start, end) if border > position]
            taken = min([count, *(border - position for border in borders)])
            target = next((to + position - start for start, end, to in moves if start <= position < end), position)
            found += right(self, target, taken)
            position, count = position + taken, count - taken
        return found

    monkeypatch.setattr(Order, "runs", runs)


@pytest.fixture
def misread(tmp_path, sources, monkeypatch):
    """misread("a", moves): the findings about the run, read as `read_elsewhere` says."""

    def make(source, moves):
        with monkeypatch.context() as patched:
            read_elsewhere(patched, source, moves)
            run_all(tmp_path / "misread", sources)
        return findings(tmp_path / "misread")

    return make


def rows_of_source(reading: Reading, source: str) -> list[int]:
    return [row for row, name in enumerate(reading.sources) if name == source]


def test_a_row_that_reads_what_another_is_for_is_named_and_what_it_read(whole, misread):
    step = Reading(whole, 5)
    row, other = rows_of_source(step, "a")[1], rows_of_source(step, "a")[4]
    at, target = step.positions[row], step.positions[other]
    [found] = misread("a", [(at, at + 32, target)])
    assert (found.kind, found.step, found.source, found.rows) == ("repeated", 5, "a", [(5, row), (5, other)])
    assert found.shards == [*step.shards(row), *step.shards(other)]
    assert (found.lost_tokens, found.repeated_tokens) == (32, 32)


def test_two_rows_swapped_in_a_step_are_named(whole, misread):
    step = Reading(whole, 8)
    one, other = rows_of_source(step, "b")[0], rows_of_source(step, "b")[2]
    at, to = step.positions[one], step.positions[other]
    [found] = misread("b", [(at, at + 128, to), (to, to + 128, at)])
    assert (found.kind, found.step, found.source, found.rows) == ("swapped", 8, "b", [(8, one), (8, other)])
    assert found.shards == [*step.shards(one), *step.shards(other)]
    assert (found.lost_tokens, found.repeated_tokens) == (0, 0)


def test_two_rows_swapped_with_the_next_step_are_named_once(whole, misread):
    first, second = Reading(whole, 2), Reading(whole, 3)
    one, other = rows_of_source(first, "a")[2], rows_of_source(second, "a")[3]
    at, to = first.positions[one], second.positions[other]
    [found] = misread("a", [(at, at + 32, to), (to, to + 32, at)])
    assert (found.kind, found.step, found.source, found.rows) == ("swapped", 2, "a", [(2, one), (3, other)])
    assert set(found.shards) == {*first.shards(one), *second.shards(other)}


def test_a_row_passed_over_is_named_and_the_steps_after_that_read_a_row_too_far(whole, misread):
    step = Reading(whole, 11)
    row = rows_of_source(step, "c")[1]
    found = misread("c", [(step.positions[row], 1 << 40, step.positions[row] + 64)])
    assert [(each.kind, each.step, each.source) for each in found] == [("lost", number, "c") for number in (11, 12, 13)]
    assert found[0].rows == [(11, row)]
    assert found[0].shards == step.shards(row)
    assert found[0].lost_tokens == 64
    assert found[1].rows == [(12, rows_of_source(Reading(whole, 12), "c")[0])]


def test_a_row_read_again_in_the_place_of_the_next_is_named(whole, misread):
    step = Reading(whole, 13)
    line = rows_of_source(step, "c")
    [found] = misread("c", [(step.positions[line[1]], 1 << 40, step.positions[line[0]])])
    assert (found.kind, found.step, found.source, found.rows) == ("repeated", 13, "c", [(13, line[1])])
    assert found.shards == step.shards(line[1])


@pytest.mark.parametrize("tokens", [1, -3])
def test_a_row_that_begins_at_a_wrong_token_is_named(whole, misread, tokens):
    step = Reading(whole, 4)
    row = rows_of_source(step, "b")[1]
    at = step.positions[row]
    [found] = misread("b", [(at, at + 32, at + tokens)])
    assert (found.kind, found.step, found.source, found.rows) == ("unlike", 4, "b", [(4, row)])
    assert found.shards == step.shards(row)
    assert f"was read {abs(tokens)} tokens {'further on' if tokens > 0 else 'before'}" in found.says


def test_a_source_that_is_read_elsewhere_in_a_step_is_named(whole, misread):
    step = Reading(whole, 9)
    at, end = step.line["taken"]["b"]
    [found] = misread("b", [(at, end, at + 5)])
    assert (found.kind, found.step, found.source) == ("unlike", 9, "b")
    assert "all rows of b were read 5 tokens further on" in found.says


def test_ranges_that_no_single_row_explains_are_named_by_step_and_shards(whole, misread):
    step = Reading(whole, 6)
    a, b, c = rows_of_source(step, "a")[:3]
    at = [step.positions[row] for row in (a, b, c)]
    [found] = misread("a", [(at[0], at[0] + 32, at[1]), (at[1], at[1] + 32, at[2]), (at[2], at[2] + 32, at[0])])
    assert (found.kind, found.step) == ("unlike", 6)
    assert "no single row explains it" in found.says
    assert found.shards


def test_shares_given_to_the_wrong_sources_are_named_without_asking_the_loader_who_gets_a_row(
    tmp_path, sources, monkeypatch
):
    right = mixture._quotas
    monkeypatch.setattr(mixture, "_quotas", lambda shares: right(shares)[::-1])
    caches = (mixture._pattern, mixture._portions)
    for cache in caches:
        cache.cache_clear()
    try:
        train(tmp_path, {name: sources[name] for name in "ab"}, [SHORT, LONG], NOTHING, 12, 1)
        found = findings(tmp_path)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert [(each.kind, each.step, each.source) for each in found] == [("unlike", 6, "a"), ("unlike", 12, "a")]
    assert "phase short has taken 22 rows of a; its share is 50.4" in found[0].says


def test_tensor_parallel_ranks_that_disagree_are_stopped_or_named(folder):
    lines, step = lines_of(folder), Reading(folder, 5)
    own = [step.hash(row, row) for row in range(12)]
    for row, other in ((row, other) for row in range(12) for other in range(12) if row != other):
        misled = sum(own) - own[row] + step.hash(row, other)
        ranks = [Digests(sum(own) % 2**64, 0), Digests(misled % 2**64, 0)]
        summed = [sum(parts) for parts in zip(*map(halves, ranks), strict=True)]
        if any(half % 2 for half in summed):
            with pytest.raises(RuntimeError, match="does not divide by tp_size 2"):
                joined(summed, tp_size=2)
            continue
        line_of(lines, 5)["ranges"] = f"{joined(summed, tp_size=2).ranges:016x}"
        break
    write(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, found.rows) == ("repeated", 5, [(5, row), (5, other)])
    assert "on one of 2 tensor-parallel ranks" in found.says


# What is wrong with the ledger


def test_evidence_without_a_row_or_with_one_twice_names_it(folder):
    lines, step = lines_of(folder), Reading(folder, 7)
    right = int(line_of(lines, 7)["ranges"], 16)
    assert right == sum(step.hash(row, row) for row in range(6)) % 2**64, "the formula of the evidence, said once more"
    for sign, kind, says in ((-1, "lost", "was not read"), (1, "repeated", "was read twice")):
        line_of(lines, 7)["ranges"] = f"{(right + sign * step.hash(2, 2)) % 2**64:016x}"
        write(folder, lines)
        [found] = findings(folder)
        assert (found.kind, found.step, found.source, found.rows) == (kind, 7, step.sources[2], [(7, 2)])
        assert found.shards == step.shards(2)
        assert says in found.says


def test_rows_of_two_sources_swapped_are_named(folder):
    lines, step = lines_of(folder), Reading(folder, 3)
    a, b = rows_of_source(step, "a")[0], rows_of_source(step, "b")[0]
    change = step.hash(a, b) + step.hash(b, a) - step.hash(a, a) - step.hash(b, b)
    line_of(lines, 3)["ranges"] = f"{(int(line_of(lines, 3)['ranges'], 16) + change) % 2**64:016x}"
    write(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, sorted(found.rows)) == ("swapped", 3, sorted([(3, a), (3, b)]))


def test_a_step_that_is_not_there_is_named_with_what_nobody_took(folder):
    lines, step = lines_of(folder), Reading(folder, 10)
    lines.remove(step.line)
    write(folder, lines)
    found = findings(folder)
    assert (found[0].kind, found[0].step) == ("ledger", 10)
    assert "step 10 is not in the ledger" in found[0].says
    lost = {finding.source: finding for finding in found[1:]}
    assert {source: finding.lost_tokens for source, finding in lost.items()} == {
        source: after - before for source, (before, after) in step.line["taken"].items()
    }
    for source, finding in lost.items():
        before, after = step.line["taken"][source]
        files = [shard.file for shard in split_of(folder, source).shards]
        ranges = [
            f"{files[shard]}:{first}+{tokens}"
            for shard, first, tokens in pieces_of(folder, source, before, after - before)
        ]
        assert finding.shards == (ranges if len(ranges) <= 8 else [*ranges[:8], "…"])


def test_the_last_steps_before_a_start_are_missed_too(folder):
    lines = lines_of(folder)
    lines.remove(line_of(lines, 7))
    write(folder, lines)
    found = findings(folder)
    assert (found[0].kind, found[0].step) == ("ledger", 7)
    assert {finding.source for finding in found if finding.lost_tokens} == {"a", "b"}


def test_a_step_that_is_there_again_with_other_content_is_named(folder):
    lines = lines_of(folder)
    place = lines.index(line_of(lines, 9))
    lines.insert(place + 1, {**lines[place], "ranges": "0" * 16})
    write(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step) == ("ledger", 9)
    assert f"(line {place + 2}), with other content" in found.says


def test_two_steps_in_the_wrong_order_are_named(folder):
    lines = lines_of(folder)
    one, other = lines.index(line_of(lines, 9)), lines.index(line_of(lines, 10))
    lines[one], lines[other] = lines[other], lines[one]
    write(folder, lines)
    found = findings(folder)
    assert {9} <= {finding.step for finding in found}
    assert any("step 9 is not in the ledger" in finding.says for finding in found)
    assert any("step 9 is there again" in finding.says for finding in found)


@pytest.mark.parametrize(
    ("end", "by", "kinds"),
    [(1, -128, {"unlike", "lost"}), (1, 128, {"unlike", "repeated"}), (0, -128, {"unlike", "repeated"})],
)
def test_an_edited_cursor_is_named_where_it_does_not_chain(folder, end, by, kinds):
    lines = lines_of(folder)
    line_of(lines, 8)["taken"]["b"][end] += by
    write(folder, lines)
    found = findings(folder)
    assert all(finding.source == "b" and finding.step in (8, 9) for finding in found)
    assert {finding.kind for finding in found} == kinds
    assert any("took" in finding.says and finding.step == 8 for finding in found)


def test_cursors_moved_as_one_are_named_by_what_was_really_read(folder):
    lines = lines_of(folder)
    for line in lines:
        if line["kind"] == "step" and line["step"] > 7 and "c" in line["taken"]:
            line["taken"]["c"] = [end + 64 for end in line["taken"]["c"]]
    write(folder, lines)
    found = findings(folder)
    [lost] = [finding for finding in found if finding.lost_tokens and finding.rows == ()]
    assert (lost.source, lost.lost_tokens, lost.step) == ("c", 64, 10)
    assert {finding.step for finding in found if finding is not lost} == {10, 11, 12, 13}


def test_a_start_that_takes_a_source_up_elsewhere_is_named(folder):
    lines = lines_of(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["cursor"]["a"] += 32
    write(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, found.source) == ("changed", 7, "a")


@pytest.mark.parametrize(
    ("phase", "field", "value", "step"),
    [
        (1, "rows", 3, 8),
        (1, "seq_len", 64, 8),
        (1, "mixture", {"a": 0.6, "b": 0.4}, 8),
        (2, "mixture", {"a": 0.5, "c": 0.5}, 10),
    ],
)
def test_a_changed_phase_is_named_at_the_first_step_it_does_not_fit(folder, phase, field, value, step):
    lines = lines_of(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["phases"][phase][field] = value
    write(folder, lines)
    found = findings(folder)
    assert min(finding.step for finding in found if finding.kind == "unlike") == step
    past = [finding for finding in found if "has other phases for the steps already made" in finding.says]
    assert len(past) == (step == 8), "step 7 was of the phase too"


@pytest.mark.parametrize(("field", "value"), [("seed", 4), ("block_tokens", 65), ("window_tokens", 640)])
def test_a_start_with_another_order_is_named(folder, field, value):
    lines = lines_of(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last[field] = value
    write(folder, lines)
    [found] = findings(folder)
    assert f"has {field} {value}" in found.says


def test_another_corpus_is_named(folder, sources):
    lines = lines_of(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["fingerprints"]["b"] = "0" * 64
    write(folder, lines)
    assert {(found.kind, found.source) for found in findings(folder)} == {("changed", "b")}
    shutil.copy(f"{sources['c']}/{manifest.FILE}", manifest_copy(folder, "b"))
    assert any("the copy of the manifest of b" in found.says for found in findings(folder))


def test_what_was_thrown_away_may_be_anything_and_a_run_begun_anew_too(folder):
    """Steps that no checkpoint kept are evidence, and no part of the run."""
    lines = lines_of(folder)
    old = next(line for line in lines if line["kind"] == "step" and line["step"] == 5)
    old["taken"] = {"a": [0, 7]}
    for line in lines:
        if line.get("after"):
            line["after"] += 2
    begun = {**lines[0], "seed": 99, "fingerprints": {"a": "1" * 64, "b": "2" * 64}}
    write(folder, [begun, {**old, "step": 1}, *lines])
    assert findings(folder) == []


def test_a_damaged_line_is_named(folder):
    text = (folder / FILE).read_text().splitlines(keepends=True)
    text[3] = text[3].replace('"ranges":', '"ranges"')
    (folder / FILE).write_text("".join(text))
    found = findings(folder)
    assert "line 4 cannot be read" in found[0].says
    assert any("step 3 is not in the ledger" in finding.says for finding in found)


def test_a_ledger_that_begins_in_the_middle_proves_nothing_of_what_is_before(folder):
    lines = lines_of(folder)
    write(folder, [line for line in lines if line["step"] >= 7 and line is not line_of(lines, 7)])
    found = findings(folder)
    assert "goes on from a checkpoint made after line 12, where other steps were made" in found[0].says
    assert "steps 1 to 7 are not in the ledger" in found[1].says
    assert {finding.source for finding in found if finding.lost_tokens} == {"a", "b"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 2**70), ("fingerprints", 1), ("skipped", {"a": "x"}), ("cursor", {"a": -1}), ("name", []), ("tokens", "x"),
        ("rows", 2**40), ("seq_len", 0), ("mixture", 0), ("mixture", []), ("mixture", {"a": [1]}), ("mixture", {}),
        ("mixture", {"a": 0.5}), ("mixture", {"a": 2.0, "b": -1.0}),
    ],
)  # fmt: skip
def test_a_start_that_no_trainer_writes_is_named_as_unreadable(folder, field, value):
    lines = lines_of(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    (last if field in last else last["phases"][2])[field] = value
    write(folder, lines)
    assert f"line {lines.index(last) + 1} cannot be read" in findings(folder)[0].says


def test_a_start_edited_to_a_step_far_on_is_named(folder):
    lines = lines_of(folder)
    for start in [line for line in lines if line["kind"] == "start"][1:]:
        step, start["step"] = start["step"], 10**12
        write(folder, lines)
        assert "where other steps were made" in findings(folder)[0].says
        start["step"] = step


MATTERS = {
    "step": {"step", "taken", "ranges"},
    "skip": {"step", "source", "shard"},
    "start": {"step", "after", "cursor", "seed", "block_tokens", "window_tokens", "fingerprints", "skipped"},
}
"""Fields of lines that are proven right; of a schedule it is what lies in the past, of thrown away lines nothing."""
STRANGE = (
    0, 1, -1, 7, 2**40, 10**12, 2**62, 2**63, 2**64, 2**70, 0.5, 1e300, True, None, "", "x", "a", "0" * 16, "f" * 15 + "-",
    [], {}, [[]], [0], [1, 2], ["a"], {"a": 1}, {"a": [0, 1]}, {"a": ["b"]}, {"x": "y"}, {"": {}},
)  # fmt: skip


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, sources) -> Path:
    """A run with every kind of line, each of which counts."""
    folder = tmp_path_factory.mktemp("runs") / "skipping"
    folder.mkdir()
    two, file = {name: sources[name] for name in "ab"}, manifest.load(sources["b"]).train.shards[1].file
    at_3 = train(folder, two, [SHORT, LONG], NOTHING, 3, 1)
    at_5 = train(folder, two, [SHORT, LONG], at_3, 5, 1, skip=("b", file))
    train(folder, two, [SHORT, LONG], at_5, 9, 2)
    assert findings(folder) == []
    return folder


def mutated(tree, draw: random.Random) -> tuple[str, ...]:
    """One value somewhere in the tree is another one; returns where."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.7:
        return (str(key), *mutated(tree[key], draw))
    old = tree[key]
    tree[key] = draw.choice([value for value in STRANGE if value != old or type(value) is not type(old)])
    if type(old) is int and draw.random() < 0.5:
        tree[key] = old + draw.choice([-64, -32, -1, 1, 32, 64])
    if isinstance(tree, dict) and draw.random() < 0.1:
        tree[key] = old
        tree[draw.choice(["a", "name", "kind", "extra"]) + "!"] = tree.pop(key)
    return (str(key),)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_line_is_edited_to_there_is_a_verdict_and_no_proof_of_what_matters(
    skipping, tmp_path, seed, monkeypatch
):
    monkeypatch.setattr(feed, "MOST_SEARCHES", 1)
    monkeypatch.setattr("trainer.audit.corpora.MOST_SHOWN_TOKENS", 1 << 14)
    draw = random.Random(seed)
    (tmp_path / "run").mkdir()
    shutil.copytree(skipping / "manifests", tmp_path / "run" / "manifests")
    right, proofs = lines_of(skipping), 0
    for turn in range(100):
        lines = lines_of(skipping)
        kind = draw.choice([*MATTERS])
        number = draw.choice([number for number, line in enumerate(lines) if line["kind"] == kind])
        where = mutated(lines[number], draw)
        write(tmp_path / "run", lines)
        try:
            proven = audited(tmp_path / "run").proven
            if turn % 5 == 0:
                command(tmp_path / "run", "--step", "6", "--json")
        except UserError:
            continue
        changed = {name for name, value in right[number].items() if lines[number].get(name) != value}
        assert not (proven and changed & MATTERS[kind]), (kind, number, where, lines[number])
        proofs += proven
    assert 0 < proofs < 50, "some edits are harmless, such as to the time"


# The command


def test_findings_are_counted_where_they_are_too_many_and_searches_too(folder, monkeypatch):
    monkeypatch.setattr("trainer.audit.verdict.MOST_FINDINGS", 3)
    monkeypatch.setattr(feed, "MOST_SEARCHES", 1)
    lines = lines_of(folder)
    for line in lines:
        if line["kind"] == "step":
            line["ranges"] = "0" * 16
    write(folder, lines)
    verdict = audited(folder)
    assert (len(verdict.findings), verdict.num_findings) == (3, STEPS)


def command(folder: Path, *words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    audit.add_arguments(parser)
    return audit.run(parser.parse_args([str(folder), *words]))


def test_the_command_says_proven_with_0_and_what_is_wrong_with_1(folder, capsys):
    assert command(folder) == 0
    assert "proven: each step once, each token once" in capsys.readouterr().out
    assert command(folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["proven"], said["steps"], said["sources"]["a"]["lost_tokens"]) == (True, STEPS, 0)
    lines = lines_of(folder)
    lines.remove(line_of(lines, 10))
    write(folder, lines)
    assert command(folder) == 1
    assert "NOT proven" in (said := capsys.readouterr().out)
    assert "step 10 is not in the ledger" in said


def test_the_command_prints_what_the_rows_of_a_step_were_fed(folder, capsys):
    step = Reading(folder, 8)
    assert command(folder, "--step", "8", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["row"], row["source"], row["shards"]) for row in said] == [
        (row, step.sources[row], step.shards(row)) for row in range(6)
    ]
    assert command(folder, "--step", "8") == 0
    words = capsys.readouterr().out.splitlines()
    assert len(words) == sum(len(step.shards(row)) for row in range(6))
    file, tokens = step.shards(0)[0].split(":")
    assert words[0].endswith(f": tandem inspect {step.sources[0].upper()} --shard {file} --tokens {tokens}")


def test_what_cannot_be_audited_is_the_user_s_mistake(folder, tmp_path):
    with pytest.raises(UserError, match=r"--step: 99; .*no such step"):
        command(folder, "--step", "99")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        command(tmp_path / "nowhere")
    manifest_copy(folder, "a").unlink()
    with pytest.raises(UserError, match=r"manifests/a.json: no such file; an audit compares"):
        command(folder)
    (folder / FILE).write_text("{}\n")
    with pytest.raises(UserError, match=r"has no start"):
        command(folder)
