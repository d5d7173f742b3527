"""The guard's decisions are in the ledger, and the audit checks them: skipped updates, rows passed over."""

import json
import shutil
from pathlib import Path

import pytest

from tandem.trainer.config.numbers import format_count
from tandem.trainer.data import manifest
from tests.trainer.tools.audit.runs import (
    FRESH_STATE,
    LONG_PHASE,
    SHORT_PHASE,
    SavedState,
    findings,
    read_lines,
    run_audit,
    run_audit_command,
    state_at,
    step_line,
    webdataset_reader,
    write_ledger,
    write_lines,
)

PHASES = [SHORT_PHASE, LONG_PHASE]


def two(sources: dict) -> dict:
    return {name: sources[name] for name in "ab"}


def start_of(lines: list[dict], **fields) -> dict:
    """Return the last start with these fields."""
    starts = [line for line in lines if line["kind"] == "start"]
    return next(line for line in reversed(starts) if fields.items() <= line.items())


def bad_of(lines: list[dict], step: int) -> dict:
    return next(line for line in reversed(lines) if line["kind"] == "bad" and line["step"] == step)


def go_back_twice(folder: Path, sources: dict, until: int = 9) -> SavedState:
    """Write a process that skips the update of step 2, rolls back to step 3 from 6 and from 5, and skips the update of 4."""
    reached = write_ledger(folder, two(sources), PHASES, FRESH_STATE, 6, 1, bad={2: "skip", 6: "rollback"}).cursor
    at_3 = state_at(folder, 3)
    reached = write_ledger(
        folder, two(sources), PHASES, at_3, 5, 1, skip_cursor=reached, rollback=True, bad={5: "rollback"}
    ).cursor
    return write_ledger(
        folder, two(sources), PHASES, at_3, until, 1, skip_cursor=reached, rollback=True, bad={4: "skip"}
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory, sources) -> Path:
    """`go_back_twice`, and a process that continues from there to the end."""
    folder = tmp_path_factory.mktemp("runs") / "back"
    folder.mkdir()
    at_9 = go_back_twice(folder, sources)
    write_ledger(folder, two(sources), PHASES, at_9, 12, 2)
    return folder


@pytest.fixture
def back(written, tmp_path) -> Path:
    """A copy of the run that a test can change."""
    return shutil.copytree(written, tmp_path / "back")


def test_rows_passed_over_are_known_and_neither_lost_nor_taken(back, sources):
    verdict = run_audit(back, webdataset_reader(sources))
    assert verdict.findings == []
    assert (verdict.num_steps, verdict.num_skipped_updates) == (12, 2)
    passed = start_of(read_lines(back), is_rollback=True)["skipped_ranges"]
    end = step_line(read_lines(back), 12)["read_ranges"]
    for source, standing in verdict.sources.items():
        assert standing.rollback_tokens == passed[source][1] - passed[source][0] > 0
        assert standing.tokens == end[source][1] - standing.rollback_tokens
        assert standing.rollback_ranges
    assert sum(standing.tokens for standing in verdict.sources.values()) == SHORT_PHASE.tokens + LONG_PHASE.tokens
    b = verdict.sources["b"]
    assert b.cursor > passed["b"][1] + b.epoch_tokens, "a later epoch takes what was passed over"


def test_the_history_tells_what_was_left_out_and_passed_over(back, capsys):
    assert run_audit_command(back) == 0
    said = capsys.readouterr().out
    assert f"{back}: 12 steps, 2 of them without an update" in said
    assert "step 2: update skipped, loss of step 2 is not finite\n" in said
    assert "step 4: update skipped, loss of step 4 is not finite\n" in said
    assert "step 3: rollback from step 6, loss of step 6 is not finite, dp 1; discards steps 4 to 6: 3 steps" in said
    assert "step 3: rollback from step 5, loss of step 5 is not finite, dp 1; discards steps 4 to 5: 2 steps" in said
    passed = [start_of(read_lines(back), is_rollback=True)["skipped_ranges"][source] for source in "ab"]
    a, b = (format_count(end - left) for left, end in passed)
    assert f"passes over the tokens read by then: {a} of a, {b} of b\n" in said
    assert said.count("    passed over by rollbacks: ") == 2
    assert run_audit_command(back, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["proven"], said["num_skipped_updates"]) == (True, 2)
    assert said["sources"]["a"]["rollback_tokens"] + said["sources"]["a"]["tokens"] == said["sources"]["a"]["cursor"]
    assert run_audit_command(back, "--step", "4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == SHORT_PHASE.global_batch_size


def test_a_process_that_begins_after_a_rollback_passes_over_the_same(tmp_path, sources):
    go_back_twice(tmp_path, sources, until=5)
    at_3, over = state_at(tmp_path, 3), start_of(read_lines(tmp_path), is_rollback=True)["cursor"]
    at_3 = at_3._replace(
        num_ledger_lines=start_of(read_lines(tmp_path), is_rollback=True)["num_ledger_lines"],
        cursor=read_by(tmp_path, 3),
    )
    write_ledger(tmp_path, two(sources), PHASES, at_3, 12, 2, skip_cursor=over)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert "step 3: restart, dp 2; discards steps 4 to 5" in "\n".join(verdict.notes)
    lines = read_lines(tmp_path)
    start_of(lines, is_rollback=True)["cursor"]["a"] += 32
    write_lines(tmp_path, lines)
    [found] = findings(tmp_path)
    assert (found.kind, found.step, found.source) == ("changed", 3, "a"), "the rollback's line says another cursor"


def read_by(folder: Path, step: int) -> dict[str, int]:
    """Return the cursor after the first time that a step was made."""
    line = next(line for line in read_lines(folder) if line["kind"] == "step" and line["step"] == step)
    return {source: end for source, (_, end) in line["read_ranges"].items()}


def test_a_process_that_begins_after_a_rollback_and_passes_over_other_rows_is_named(tmp_path, sources):
    reached = write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 6, 1, bad={6: "rollback"}).cursor
    at_3 = state_at(tmp_path, 3)
    write_ledger(tmp_path, two(sources), PHASES, at_3, 4, 1, skip_cursor=reached, rollback=True)
    write_ledger(tmp_path, two(sources), PHASES, at_3, 12, 1, skip_cursor=reached | {"a": reached["a"] + 32})
    found = findings(tmp_path)
    assert (found[0].kind, found[0].step, found[0].source) == ("changed", 3, "a")
    assert (
        f"passes over a up to {reached['a'] + 32}; step 6, from which it rolls back, had read up to" in found[0].message
    )
    assert (found[1].kind, found[1].lost_tokens) == ("lost", 32)


def test_a_run_that_begins_anew_after_a_rollback_to_its_start_passes_over_the_same(tmp_path, sources):
    reached = write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 2, 1, bad={2: "rollback"}).cursor
    write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 2, 1, skip_cursor=reached, rollback=True)
    write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 12, 1, skip_cursor=reached)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert {source: standing.rollback_tokens for source, standing in verdict.sources.items()} == reached


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        (
            lambda start: start["skipped_ranges"]["a"].__setitem__(1, start["skipped_ranges"]["a"][1] + 32),
            "changed",
            "passes over a up to",
        ),
        (
            lambda start: start["skipped_ranges"]["a"].__setitem__(1, start["skipped_ranges"]["a"][1] - 32),
            "changed",
            "passes over a up to",
        ),
        (
            lambda start: start["skipped_ranges"]["a"].__setitem__(0, start["skipped_ranges"]["a"][0] - 32),
            "changed",
            "continues a at",
        ),
        (lambda start: start["cursor"].update(a=start["cursor"]["a"] + 32), "changed", "passes over a up to"),
        (lambda start: start["skipped_ranges"].pop("a"), "changed", "continues a at"),
        (lambda start: start.update(is_rollback=False), "changed", "passes over a up to"),
        (lambda start: start["skipped_ranges"]["a"].reverse(), "ledger", "cannot be read"),
        (lambda start: start["skipped_ranges"]["a"].append(1), "ledger", "cannot be read"),
    ],
)
def test_a_rollback_edited_to_pass_over_other_rows_is_named(back, edit, kind, says):
    lines = read_lines(back)
    edit(start_of(lines, is_rollback=True))
    write_lines(back, lines)
    found = findings(back)
    assert found[0].kind == kind
    assert says in found[0].message


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines.remove(bad_of(lines, 5)),
        lambda lines: bad_of(lines, 5).update(action="skip"),
        lambda lines: bad_of(lines, 5).update(step=4),
        lambda lines: lines.insert(lines.index(bad_of(lines, 5)) + 1, {**bad_of(lines, 5), "action": "skip"}),
    ],
)
def test_a_rollback_without_the_bad_step_it_goes_back_from_is_named(back, edit):
    lines = read_lines(back)
    size = len(lines)
    edit(lines)
    for line in lines:
        if line["kind"] == "start" and line["step"] == 9:
            line["num_ledger_lines"] += len(lines) - size
    write_lines(back, lines)
    found = findings(back)
    assert "no bad step from which the run rolled back precedes it" in found[0].message
    assert {each.source for each in found if each.lost_tokens} == {"a", "b"}, "what it passed over is lost, then"


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_step_after_one_that_was_to_be_the_last_is_named(back, action):
    lines = read_lines(back)
    bad_of(lines, 2)["action"] = action
    write_lines(back, lines)
    [found] = findings(back)
    assert (found.kind, found.step) == ("ledger", 3)
    assert "step 3 follows step 2, at which the run had to" in found.message


def test_a_bad_line_that_does_not_follow_its_step_is_named(back):
    lines = read_lines(back)
    bad_of(lines, 4)["step"] = 3
    write_lines(back, lines)
    verdict = run_audit(back)
    [found] = verdict.findings
    assert "marks step 3 as bad; the line before it is not that step's" in found.message
    assert verdict.num_skipped_updates == 1


def test_a_loader_that_reads_the_rows_again_that_the_ledger_passes_over_is_named(tmp_path, sources):
    """The cursors are what the trainer had to read; the digests are what it read."""
    reached = write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 6, 1, bad={6: "rollback"}).cursor
    at_3 = state_at(tmp_path, 3)
    write_ledger(tmp_path, two(sources), PHASES, at_3, 5, 1, skip_cursor=reached, rollback=True)
    lines = read_lines(tmp_path)
    again = next(line for line in lines if line["kind"] == "step" and line["step"] == 4)
    step_line(lines, 4)["ranges_digest"] = again["ranges_digest"]
    write_lines(tmp_path, lines)
    assert [(found.kind, found.step) for found in findings(tmp_path)] == [("unlike", 4)]


def test_a_rollback_may_leave_out_the_shards_that_were_damaged_in_the_meantime_and_no_others(tmp_path, sources):
    a, b = (manifest.load_manifest(sources[source]).train.shards[1].file for source in "ab")
    at_3 = write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 3, 1)
    reached = write_ledger(tmp_path, two(sources), PHASES, at_3, 5, 1, skip=("b", b), bad={5: "rollback"})
    knowing = at_3._replace(skipped=reached.skipped)
    write_ledger(tmp_path, two(sources), PHASES, knowing, 8, 1, skip_cursor=reached.cursor, rollback=True)
    assert findings(tmp_path) == []
    lines = read_lines(tmp_path)
    start_of(lines, is_rollback=True)["skipped_shards"]["a"] = [a]
    write_lines(tmp_path, lines)
    assert f"skips other shards than the run: {a} of a, {b} of b" in findings(tmp_path)[0].message


@pytest.mark.parametrize("until", [6, 5])
def test_a_run_killed_before_it_went_back_or_ended_at_a_bad_step_is_proven(tmp_path, sources, until):
    action = "rollback" if until == 6 else "stop"
    write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, until, 1, bad={until: action})
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert verdict.notes[-1].endswith("; the run had to roll back" if action == "rollback" else "; the run had to stop")
    write_ledger(tmp_path, two(sources), PHASES, state_at(tmp_path, 3), 12, 1)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert (verdict.num_steps, verdict.num_skipped_updates) == (12, 0)


def test_a_run_may_go_on_from_a_checkpoint_of_the_bad_step_that_ended_it(tmp_path, sources):
    at_5 = write_ledger(tmp_path, two(sources), PHASES, FRESH_STATE, 5, 1, bad={5: "stop"})
    write_ledger(tmp_path, two(sources), PHASES, at_5, 12, 1)
    verdict = run_audit(tmp_path)
    assert verdict.findings == []
    assert (verdict.num_steps, verdict.num_skipped_updates) == (12, 1)


def test_a_ledger_of_before_there_were_rollbacks_stays_readable(folder):
    lines = read_lines(folder)
    for line in lines:
        if line["kind"] == "start":
            del line["skipped_ranges"], line["is_rollback"]
    write_lines(folder, lines)
    assert findings(folder) == []
