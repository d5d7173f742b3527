"""Errors of the ledger are named, whichever field of a line was changed."""

import random
import shutil
from pathlib import Path

import pytest

from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.ledger import LEDGER_FILE, manifest_copy_path
from tandem.trainer.tools.audit import step_checks
from tests.trainer.tools.audit.runs import (
    FRESH_STATE,
    LONG_PHASE,
    SHORT_PHASE,
    ExpectedStep,
    findings,
    position_pieces,
    read_lines,
    rows_of_source,
    run_audit,
    run_audit_command,
    state_at,
    step_line,
    train_split,
    write_ledger,
    write_lines,
)


def test_evidence_without_a_row_or_with_one_twice_names_it(folder):
    lines, step = read_lines(folder), ExpectedStep(folder, 7)
    right = int(step_line(lines, 7)["ranges_digest"], 16)
    assert right == sum(step.hash(row, row) for row in range(6)) % 2**64, "the formula of the evidence, said once more"
    for sign, kind, says in ((-1, "lost", "was not read"), (1, "repeated", "was read twice")):
        step_line(lines, 7)["ranges_digest"] = f"{(right + sign * step.hash(2, 2)) % 2**64:016x}"
        write_lines(folder, lines)
        [found] = findings(folder)
        assert (found.kind, found.step, found.source, found.rows) == (kind, 7, step.sources[2], [(7, 2)])
        assert found.shard_ranges == step.shards(2)
        assert says in found.message


def test_rows_of_two_sources_swapped_are_named(folder):
    lines, step = read_lines(folder), ExpectedStep(folder, 3)
    a, b = rows_of_source(step, "a")[0], rows_of_source(step, "b")[0]
    change = step.hash(a, b) + step.hash(b, a) - step.hash(a, a) - step.hash(b, b)
    step_line(lines, 3)["ranges_digest"] = f"{(int(step_line(lines, 3)['ranges_digest'], 16) + change) % 2**64:016x}"
    write_lines(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, sorted(found.rows)) == ("swapped", 3, sorted([(3, a), (3, b)]))


def test_a_step_that_is_not_there_is_named_with_what_nobody_took(folder):
    lines, step = read_lines(folder), ExpectedStep(folder, 10)
    lines.remove(step.line)
    write_lines(folder, lines)
    found = findings(folder)
    assert (found[0].kind, found[0].step) == ("ledger", 10)
    assert "step 10 is not in the ledger" in found[0].message
    lost = {finding.source: finding for finding in found[1:]}
    assert {source: finding.lost_tokens for source, finding in lost.items()} == {
        source: after - before for source, (before, after) in step.line["read_ranges"].items()
    }
    for source, finding in lost.items():
        before, after = step.line["read_ranges"][source]
        files = [shard.file for shard in train_split(folder, source).shards]
        ranges = [
            f"{files[shard]}:{first}+{tokens}"
            for shard, first, tokens in position_pieces(folder, source, before, after - before)
        ]
        assert finding.shard_ranges == (ranges if len(ranges) <= 8 else [*ranges[:8], "…"])


def test_the_last_steps_before_a_start_are_missed_too(folder):
    lines = read_lines(folder)
    lines.remove(step_line(lines, 7))
    write_lines(folder, lines)
    found = findings(folder)
    assert (found[0].kind, found[0].step) == ("ledger", 7)
    assert {finding.source for finding in found if finding.lost_tokens} == {"a", "b"}


def test_a_step_that_is_there_again_with_other_content_is_named(folder):
    lines = read_lines(folder)
    place = lines.index(step_line(lines, 9))
    lines.insert(place + 1, {**lines[place], "ranges_digest": "0" * 16})
    write_lines(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step) == ("ledger", 9)
    assert f"(line {place + 2}), with other content" in found.message


def test_two_steps_in_the_wrong_order_are_named(folder):
    lines = read_lines(folder)
    one, other = lines.index(step_line(lines, 9)), lines.index(step_line(lines, 10))
    lines[one], lines[other] = lines[other], lines[one]
    write_lines(folder, lines)
    found = findings(folder)
    assert {9} <= {finding.step for finding in found}
    assert any("step 9 is not in the ledger" in finding.message for finding in found)
    assert any("step 9 appears again" in finding.message for finding in found)


@pytest.mark.parametrize(
    ("end", "by", "kinds"),
    [(1, -128, {"unlike", "lost"}), (1, 128, {"unlike", "repeated"}), (0, -128, {"unlike", "repeated"})],
)
def test_an_edited_cursor_is_named_where_it_does_not_chain(folder, end, by, kinds):
    lines = read_lines(folder)
    step_line(lines, 8)["read_ranges"]["b"][end] += by
    write_lines(folder, lines)
    found = findings(folder)
    assert all(finding.source == "b" and finding.step in (8, 9) for finding in found)
    assert {finding.kind for finding in found} == kinds
    assert any("took" in finding.message and finding.step == 8 for finding in found)


def test_cursors_moved_as_one_are_named_by_what_was_really_read(folder):
    lines = read_lines(folder)
    for line in lines:
        if line["kind"] == "step" and line["step"] > 7 and "c" in line["read_ranges"]:
            line["read_ranges"]["c"] = [end + 64 for end in line["read_ranges"]["c"]]
    write_lines(folder, lines)
    found = findings(folder)
    [lost] = [finding for finding in found if finding.lost_tokens and finding.rows == ()]
    assert (lost.source, lost.lost_tokens, lost.step) == ("c", 64, 10)
    assert {finding.step for finding in found if finding is not lost} == {10, 11, 12, 13}


def test_a_start_that_takes_a_source_up_elsewhere_is_named(folder):
    lines = read_lines(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["cursor"]["a"] += 32
    write_lines(folder, lines)
    [found] = findings(folder)
    assert (found.kind, found.step, found.source) == ("changed", 7, "a")


@pytest.mark.parametrize(
    ("phase", "field", "value", "step"),
    [
        (1, "global_batch_size", 3, 8),
        (1, "seq_len", 64, 8),
        (1, "mixture", {"a": 0.6, "b": 0.4}, 8),
        (2, "mixture", {"a": 0.5, "c": 0.5}, 10),
    ],
)
def test_a_changed_phase_is_named_at_the_first_step_it_does_not_fit(folder, phase, field, value, step):
    lines = read_lines(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["phases"][phase][field] = value
    write_lines(folder, lines)
    found = findings(folder)
    assert min(finding.step for finding in found if finding.kind == "unlike") == step
    past = [finding for finding in found if "has other phases for the steps already made" in finding.message]
    assert len(past) == (step == 8), "step 7 was of the phase too"


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 4), ("shuffle_block_tokens", 65), ("shuffle_window_tokens", 640)]
)
def test_a_start_with_another_order_is_named(folder, field, value):
    lines = read_lines(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last[field] = value
    write_lines(folder, lines)
    [found] = findings(folder)
    assert f"has {field} {value}" in found.message


def test_another_corpus_is_named(folder, sources):
    lines = read_lines(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    last["fingerprints"]["b"] = "0" * 64
    write_lines(folder, lines)
    assert {(found.kind, found.source) for found in findings(folder)} == {("changed", "b")}
    shutil.copy(f"{sources['c']}/{manifest.MANIFEST_FILE}", manifest_copy_path(folder, "b"))
    assert any("the copy of the manifest of b" in found.message for found in findings(folder))


def test_what_was_thrown_away_may_be_anything_and_a_run_begun_anew_too(folder):
    """Steps after the checkpoint from which the run continued are not part of the run."""
    lines = read_lines(folder)
    old = next(line for line in lines if line["kind"] == "step" and line["step"] == 5)
    old["read_ranges"] = {"a": [0, 7]}
    for line in lines:
        if line.get("num_ledger_lines"):
            line["num_ledger_lines"] += 2
    begun = {**lines[0], "seed": 99, "fingerprints": {"a": "1" * 64, "b": "2" * 64}}
    write_lines(folder, [begun, {**old, "step": 1}, *lines])
    assert findings(folder) == []


def test_a_damaged_line_is_named(folder):
    text = (folder / LEDGER_FILE).read_text().splitlines(keepends=True)
    text[3] = text[3].replace('"ranges_digest":', '"ranges_digest"')
    (folder / LEDGER_FILE).write_text("".join(text))
    found = findings(folder)
    assert "line 4 cannot be read" in found[0].message
    assert any("step 3 is not in the ledger" in finding.message for finding in found)


def test_a_ledger_that_begins_in_the_middle_proves_nothing_of_what_is_before(folder):
    lines = read_lines(folder)
    write_lines(folder, [line for line in lines if line["step"] >= 7 and line is not step_line(lines, 7)])
    found = findings(folder)
    assert "continues from a checkpoint made after line 12, where other steps were made" in found[0].message
    assert "steps 1 to 7 are not in the ledger" in found[1].message
    assert {finding.source for finding in found if finding.lost_tokens} == {"a", "b"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 2**70),
        ("fingerprints", 1),
        ("skipped_shards", {"a": "x"}),
        ("cursor", {"a": -1}),
        ("name", []),
        ("tokens", "x"),
        ("global_batch_size", 2**40),
        ("seq_len", 0),
        ("mixture", 0),
        ("mixture", []),
        ("mixture", {"a": [1]}),
        ("mixture", {}),
        ("mixture", {"a": 0.5}),
        ("mixture", {"a": 2.0, "b": -1.0}),
    ],
)
def test_a_start_that_no_trainer_writes_is_named_as_unreadable(folder, field, value):
    lines = read_lines(folder)
    [*_, last] = [line for line in lines if line["kind"] == "start"]
    (last if field in last else last["phases"][2])[field] = value
    write_lines(folder, lines)
    assert f"line {lines.index(last) + 1} cannot be read" in findings(folder)[0].message


def test_a_start_edited_to_a_step_far_on_is_named(folder):
    lines = read_lines(folder)
    for start in [line for line in lines if line["kind"] == "start"][1:]:
        step, start["step"] = start["step"], 10**12
        write_lines(folder, lines)
        assert "where other steps were made" in findings(folder)[0].message
        start["step"] = step


MATTERS = {
    "step": {"step", "read_ranges", "ranges_digest"},
    "skip": {"step", "source", "shard"},
    "bad": {"step", "action"},
    "start": {
        "step",
        "num_ledger_lines",
        "cursor",
        "seed",
        "shuffle_block_tokens",
        "shuffle_window_tokens",
        "fingerprints",
        "skipped_shards",
        "skipped_ranges",
        "is_rollback",
    },
}
"""Fields of lines that the audit proves. Not proven: future phases of a schedule, and discarded lines."""
STRANGE = (
    0, 1, -1, 7, 2**40, 10**12, 2**62, 2**63, 2**64, 2**70, 0.5, 1e300, True, None, "", "x", "a", "0" * 16, "f" * 15 + "-",
    [], {}, [[]], [0], [1, 2], ["a"], {"a": 1}, {"a": [0, 1]}, {"a": ["b"]}, {"x": "y"}, {"": {}},
)  # fmt: skip


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, sources) -> Path:
    """A run with every kind of line. All of them count, except step 6, which was discarded."""
    folder = tmp_path_factory.mktemp("runs") / "skipping"
    folder.mkdir()
    two, file = {name: sources[name] for name in "ab"}, manifest.load_manifest(sources["b"]).train.shards[1].file
    at_3 = write_ledger(folder, two, [SHORT_PHASE, LONG_PHASE], FRESH_STATE, 3, 1, bad={2: "skip"})
    reached = write_ledger(
        folder, two, [SHORT_PHASE, LONG_PHASE], at_3, 6, 1, skip=("b", file), bad={6: "rollback"}
    ).cursor
    at_5 = state_at(folder, 5)
    write_ledger(folder, two, [SHORT_PHASE, LONG_PHASE], at_5, 9, 1, skip_cursor=reached, rollback=True)
    assert findings(folder) == []
    return folder


def mutated(tree, draw: random.Random) -> tuple[str, ...]:
    """Replace one value in the tree. Return its path."""
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
    monkeypatch.setattr(step_checks, "MAX_SEARCHES", 1)
    monkeypatch.setattr("tandem.trainer.tools.audit.reading_order.MAX_SHOWN_TOKENS", 1 << 14)
    draw = random.Random(seed)
    (tmp_path / "run").mkdir()
    shutil.copytree(skipping / "manifests", tmp_path / "run" / "manifests")
    right, proofs = read_lines(skipping), 0
    taken_back = next(number for number, line in enumerate(right) if line["kind"] == "step" and line["step"] == 6)
    for turn in range(100):
        lines = read_lines(skipping)
        kind = draw.choice([*MATTERS])
        numbers = [number for number, line in enumerate(lines) if line["kind"] == kind]
        number = draw.choice([number for number in numbers if number != taken_back])
        where = mutated(lines[number], draw)
        write_lines(tmp_path / "run", lines)
        try:
            proven = run_audit(tmp_path / "run").proven
            if turn % 5 == 0:
                run_audit_command(tmp_path / "run", "--step", "6", "--json")
        except UserError:
            continue
        changed = {name for name, value in right[number].items() if lines[number].get(name) != value}
        assert not (proven and changed & MATTERS[kind]), (kind, number, where, lines[number])
        proofs += proven
    assert 0 < proofs < 50, "some edits are harmless, such as to the time"
