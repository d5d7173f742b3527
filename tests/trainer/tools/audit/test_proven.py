"""An audit proves what real loaders wrote, and reports the history of the run."""

import shutil
from pathlib import Path

import pytest

from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import LEDGER_FILE
from tandem.trainer.data.manifest import DamagedShard
from tandem.trainer.data.token_stream import TokenStream
from tandem.trainer.tools.audit import replay
from tests.trainer.tools.audit.runs import (
    EDITED_PHASES,
    FRESH_STATE,
    LONG_PHASE,
    NUM_STEPS,
    SHORT_PHASE,
    SavedState,
    findings,
    make_corpus,
    position_pieces,
    read_lines,
    run_audit,
    step_line,
    train_split,
    webdataset_reader,
    write_full_run,
    write_ledger,
    write_lines,
)


@pytest.mark.parametrize("chunk_rows", [1, replay.CHUNK_ROWS])
def test_a_run_over_every_kind_of_change_is_proven_and_its_history_told(whole, sources, monkeypatch, chunk_rows):
    monkeypatch.setattr(replay, "CHUNK_ROWS", chunk_rows)
    verdict = run_audit(whole)
    assert verdict.findings == []
    assert verdict.num_steps == NUM_STEPS
    notes = "\n".join(verdict.notes)
    assert "step 3: restart, dp 2; discards steps 4 to 5: 2 steps, 768 tokens; dp was 1" in notes
    assert "step 7: restart, dp 3; dp was 2; phase long: tokens 4608 -> 2304; phase edited added" in notes
    assert "source c added" in notes
    assert "step 7: phase long, 6 rows of 128 tokens" in notes
    end = read_lines(whole)[-1]["read_ranges"]
    for source, standing in verdict.sources.items():
        assert standing.tokens == standing.cursor == end[source][1]
        assert (standing.lost_tokens, standing.repeated_tokens) == (0, 0)
        assert standing.next_token == next_token(whole, source, standing.cursor)
    assert verdict.sources["b"].cursor > verdict.sources["b"].epoch_tokens, "the run must pass the end of an epoch"
    assert sum(standing.tokens for standing in verdict.sources.values()) == sum(phase.tokens for phase in EDITED_PHASES)


def next_token(folder: Path, source: str, position: int) -> str:
    [(shard, first, _)] = position_pieces(folder, source, position, 1)
    return f"{train_split(folder, source).shards[shard].file}:{first}"


def test_the_bytes_of_the_shards_are_compared_by_a_reader_of_its_own(whole, sources, monkeypatch, tmp_path):
    reader = webdataset_reader(sources)
    verdict = run_audit(whole, reader)
    assert verdict.findings == []
    assert verdict.tokens_checked
    sliced = TokenStream._token_slices

    def wrong(self, index, start, count):
        found = sliced(self, index, start, count)
        return [found[0] ^ 1, *found[1:]] if index == 5 and start == 0 else found

    monkeypatch.setattr(TokenStream, "_token_slices", wrong)
    write_full_run(tmp_path / "run", sources)
    assert findings(tmp_path / "run") == [], "the ranges are right"
    found = run_audit(tmp_path / "run", reader).findings
    assert found
    assert all("was fed other tokens than its ranges hold" in finding.message for finding in found)
    assert all(any("train-000005.tar:0+" in shard for shard in finding.shard_ranges) for finding in found)


def test_a_torn_last_line_is_told_and_no_mistake(folder):
    with (folder / LEDGER_FILE).open("ab") as file:
        file.write(b'{"kind":"step","step":14,"rea')
    verdict = run_audit(folder)
    assert verdict.proven
    assert "the last line is incomplete" in verdict.notes[-1]


def test_a_shard_left_out_is_named_and_its_tokens_are_no_loss(tmp_path, sources):
    file = manifest.load_manifest(sources["b"]).train.shards[1]
    two = {name: sources[name] for name in "ab"}
    at_3 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_3, 12, 3, skip=("b", file.file))
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    standing = verdict.sources["b"]
    assert standing.cursor > 2 * standing.epoch_tokens
    assert set(standing.skipped_shard_tokens) == {file.file}
    assert standing.skipped_shard_tokens[file.file] >= file.tokens
    assert standing.tokens + standing.skipped_shard_tokens[file.file] == standing.cursor
    lines = read_lines(tmp_path)
    write_lines(tmp_path, [line for line in lines if line["kind"] != "skip"])
    assert not run_audit(tmp_path).proven, "who says nothing of it has read other rows than the ledger says"


def test_a_shard_left_out_stays_so_over_a_restart(tmp_path, sources):
    file, two = manifest.load_manifest(sources["b"]).train.shards[1].file, {name: sources[name] for name in "ab"}
    at_3 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    at_5 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_3, 5, 1, skip=("b", file))
    write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_5, 12, 2)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert verdict.sources["b"].skipped_shard_tokens[file] > 0


def test_a_shard_is_read_again_after_a_rollback_to_before_it_was_left_out(tmp_path, sources):
    file, two = manifest.load_manifest(sources["b"]).train.shards[1].file, {name: sources[name] for name in "ab"}
    at_3 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    at_5 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_3, 5, 1, skip=("b", file))
    write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_3, 12, 2)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert verdict.sources["b"].skipped_shard_tokens == {}
    write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_5._replace(skipped={}), 12, 2)
    [found] = findings(tmp_path)
    assert f"skips other shards than the run: {file} of b" in found.message, "and the steps after it are as it says"


def test_a_run_may_go_back_to_steps_that_it_had_taken_back(tmp_path, sources):
    """The checkpoint of step 8 was unreadable for a while."""
    two = {name: sources[name] for name in "ab"}
    at_8 = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 8, 1)
    reached = {source: step_line(read_lines(tmp_path), 4)["read_ranges"][source][1] for source in two}
    write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], SavedState(4, reached, num_ledger_lines=5), 6, 2)
    end = write_ledger(tmp_path, two, [SHORT_PHASE, LONG_PHASE], at_8, 10, 2)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert {source: standing.tokens for source, standing in verdict.sources.items()} == end.cursor
    assert "step 8: restart, dp 2; discards steps 5 to 6: 2 steps" in "\n".join(verdict.notes)


def test_a_source_never_read_may_become_another_corpus(tmp_path, sources):
    two, other = {name: sources[name] for name in "ab"}, make_corpus(tmp_path / "other", 4, 40)
    run = tmp_path / "run"
    run.mkdir()
    at_3 = write_ledger(run, sources, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    at_7 = write_ledger(run, two, EDITED_PHASES[:2], at_3, 7, 1)
    at_11 = write_ledger(run, two | {"c": other}, EDITED_PHASES, at_7, 11, 1)
    assert findings(run) == []
    write_ledger(run, sources, EDITED_PHASES, at_11, 12, 1)
    assert {(found.kind, found.source) for found in findings(run)} >= {("changed", "c")}, (
        "but one that was read may not"
    )


def test_a_damaged_shard_that_was_left_out_later_is_no_hindrance_to_comparing_the_others(tmp_path, sources):
    run, mine = tmp_path / "run", {name: shutil.copytree(sources[name], tmp_path / name) for name in "ab"}
    mine = {name: str(copy) for name, copy in mine.items()}
    run.mkdir()
    at_3 = write_ledger(run, mine, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1)
    [(shard, _, _), *_] = position_pieces(run, "b", 0, 1)
    file = train_split(run, "b").shards[shard].file
    tokens = sum(count for index, _, count in position_pieces(run, "b", 0, at_3.cursor["b"]) if index == shard)
    write_ledger(run, mine, [SHORT_PHASE, LONG_PHASE], at_3, 12, 1, skip=("b", file))
    for name in "ab":
        with (Path(mine[name]) / file).open("r+b") as damaged:
            damaged.truncate(700)
        if name == "a":
            with pytest.raises(DamagedShard, match=file):
                run_audit(run, webdataset_reader(mine))
            shutil.copy(f"{sources[name]}/{file}", f"{mine[name]}/{file}")
    verdict = run_audit(run, webdataset_reader(mine))
    assert verdict.findings == []
    [note] = [note for note in verdict.notes if "cannot be read again" in note]
    assert f"b skips {file}; {tokens} of its tokens that were read before" in note
    lines = read_lines(run)
    step_line(lines, 12)["tokens_digest"] = "0" * 16
    write_lines(run, lines)
    assert [found.step for found in run_audit(run, webdataset_reader(mine)).findings] == [12]
