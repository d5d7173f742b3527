"""`tandem audit`: exit codes, messages, and errors of the user."""

import json

import pytest

from tandem.trainer.config import UserError
from tandem.trainer.data.ledger import LEDGER_FILE, manifest_copy_path
from tandem.trainer.tools.audit import step_checks
from tests.trainer.tools.audit.runs import (
    NUM_STEPS,
    ExpectedStep,
    read_lines,
    run_audit,
    run_audit_command,
    step_line,
    write_lines,
)


def test_findings_are_counted_where_they_are_too_many_and_searches_too(folder, monkeypatch):
    monkeypatch.setattr("tandem.trainer.tools.audit.result.MAX_FINDINGS", 3)
    monkeypatch.setattr(step_checks, "MAX_SEARCHES", 1)
    lines = read_lines(folder)
    for line in lines:
        if line["kind"] == "step":
            line["ranges_digest"] = "0" * 16
    write_lines(folder, lines)
    verdict = run_audit(folder)
    assert (len(verdict.findings), verdict.num_findings) == (3, NUM_STEPS)


def test_the_command_says_proven_with_0_and_what_is_wrong_with_1(folder, capsys):
    assert run_audit_command(folder) == 0
    assert "proven: every step happened once, every token was read once and in order" in capsys.readouterr().out
    assert run_audit_command(folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["proven"], said["num_steps"], said["sources"]["a"]["lost_tokens"]) == (True, NUM_STEPS, 0)
    lines = read_lines(folder)
    lines.remove(step_line(lines, 10))
    write_lines(folder, lines)
    assert run_audit_command(folder) == 1
    assert "NOT proven" in (said := capsys.readouterr().out)
    assert "step 10 is not in the ledger" in said


def test_the_command_prints_what_the_rows_of_a_step_were_fed(folder, capsys):
    step = ExpectedStep(folder, 8)
    assert run_audit_command(folder, "--step", "8", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["row"], row["source"], row["shards"]) for row in said] == [
        (row, step.sources[row], step.shards(row)) for row in range(6)
    ]
    assert run_audit_command(folder, "--step", "8") == 0
    words = capsys.readouterr().out.splitlines()
    assert len(words) == sum(len(step.shards(row)) for row in range(6))
    file, tokens = step.shards(0)[0].split(":")
    assert words[0].endswith(f": tandem inspect {step.sources[0].upper()} --shard {file} --tokens {tokens}")


def test_what_cannot_be_audited_is_the_user_s_mistake(folder, tmp_path):
    with pytest.raises(UserError, match=r"--step: .* has no step 99; "):
        run_audit_command(folder, "--step", "99")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        run_audit_command(tmp_path / "nowhere")
    manifest_copy_path(folder, "a").unlink()
    with pytest.raises(UserError, match=r"manifests/a.json: no such file; the audit compares"):
        run_audit_command(folder)
    (folder / LEDGER_FILE).write_text("{}\n")
    with pytest.raises(UserError, match=r"has no start"):
        run_audit_command(folder)
