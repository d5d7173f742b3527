"""`tandem audit`: exit codes, words, and what cannot be audited."""

import json

import pytest

from tandem.trainer.config import UserError
from tandem.trainer.data.ledger import FILE, manifest_copy
from tandem.trainer.tools.audit import step_checks
from tests.trainer.tools.audit.runs import STEPS, Reading, audited, command, line_of, lines_of, write


def test_findings_are_counted_where_they_are_too_many_and_searches_too(folder, monkeypatch):
    monkeypatch.setattr("tandem.trainer.tools.audit.result.MOST_FINDINGS", 3)
    monkeypatch.setattr(step_checks, "MOST_SEARCHES", 1)
    lines = lines_of(folder)
    for line in lines:
        if line["kind"] == "step":
            line["ranges"] = "0" * 16
    write(folder, lines)
    verdict = audited(folder)
    assert (len(verdict.findings), verdict.num_findings) == (3, STEPS)


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
