"""An audit passes what real loaders wrote, and tells its history."""

import shutil
from pathlib import Path

import pytest

from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import FILE
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.token_stream import Stream
from tandem.trainer.tools.audit import replay
from tests.trainer.tools.audit.runs import (
    EDITED,
    LONG,
    NOTHING,
    SHORT,
    STEPS,
    Saved,
    audited,
    findings,
    line_of,
    lines_of,
    make_corpus,
    pieces_of,
    reader_over,
    run_all,
    split_of,
    train,
    write,
)


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
