"""Whether finished, started, killed or abandoned, a preparation never damages a corpus in its output folder."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.data_prep import output_folder, prepare, shuffle, work_files, work_units
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tests.data_prep.conftest import file_contents, prepare_small, run_verb

ROOT = Path(__file__).resolve().parents[2]


def write_claim(output, settings):
    work_files.write_record(output / output_folder.CLAIM_FILE, output_folder.Claim(settings))


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path, folder, prepared):
    output = tmp_path / "out"
    output.mkdir()
    handle = os.open(output, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="out is being prepared by another process"):
            prepared("out", "--input", folder)
    finally:
        os.close(handle)
    assert list(output.iterdir()) == []


def test_files_of_a_planted_link_are_kept(tmp_path):
    """Also if another user knows the settings and so makes the folder look like an unfinished corpus."""
    (tmp_path / "elsewhere" / "whole-corpus").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    write_claim(tmp_path / "out", {})
    (tmp_path / "out" / "work").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(UserError, match=r"^--output: .*out/work is a link, .*; remove it"),
        output_folder.claim_output(tmp_path / "out", {}),
    ):
        pass
    assert (tmp_path / "elsewhere" / "whole-corpus").is_dir()


def test_an_output_folder_that_other_users_can_change_is_reported(tmp_path, folder, prepared, capsys):
    (tmp_path / "out\x1b[2J").mkdir()
    (tmp_path / "out\x1b[2J").chmod(0o777)
    prepared("out\x1b[2J", "--input", folder)
    assert rf"tandem: warning: --output: {tmp_path}/out\x1b[2J is writable by all users" in capsys.readouterr().err


def test_a_corpus_finished_meanwhile_is_left_as_it_is(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / manifest.MANIFEST_FILE).write_text("{}")
    write_claim(output, {})  # the first process is about to remove it
    (output / "train-000000.tar").write_text("tokens")
    with pytest.raises(UserError), output_folder.claim_output(output, {}):
        raise UserError("stopped")
    assert (output / "train-000000.tar").read_text() == "tokens"


def test_a_failed_preparation_leaves_a_finished_neighbour(tmp_path):
    def prepare():
        with output_folder.claim_output(tmp_path / "data" / "one", {}):
            (tmp_path / "data" / "two").mkdir()
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        prepare()
    assert not (tmp_path / "data" / "one").exists()
    assert (tmp_path / "data" / "two").is_dir()


def test_an_error_of_another_file_is_not_reported_as_one_of_the_output(tmp_path):
    def prepare(error):
        with output_folder.claim_output(tmp_path / "out", {}):
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out" / "work"))
    for error in (full, denied):
        with pytest.raises(UserError, match=r"--output: .*out cannot be written \("):
            prepare(error)
    with pytest.raises(
        UserError, match=r"^ConnectionError: no server at 10.0.0.1; correct the cause and run the same command"
    ):
        prepare(ConnectionError("no server\nat 10.0.0.1"))


def test_a_second_run_changes_nothing_and_another_setting_is_refused(prepared, folder, content, capsys):
    output = prepared("out", "--input", folder)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    prepared("out", "--input", folder, "--workers", 2)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(UserError, match=r"--output: .*out was prepared with seed 0, not 1"):
        prepared("out", "--input", folder, "--seed", 1)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_inputs_that_have_changed_are_refused_and_touched_ones_are_not(prepared, folder, capsys):
    output = prepared("out", "--input", folder)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    file = folder / "0" / "0.py"
    text = file.read_bytes()
    os.utime(file, (1, 1))
    prepared("out", "--input", folder)
    assert "already prepared" in capsys.readouterr().out
    refusal = r"--output: .*out was prepared from other inputs: 0/0/0.py has changed \(changed files: 1\)"
    for changed in (b"x" * len(text), text + b"x"):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=refusal):
            prepared("out", "--input", folder)
    file.unlink()
    with pytest.raises(UserError, match=refusal):
        prepared("out", "--input", folder)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_finished_folder_that_lost_a_shard_is_no_success(prepared, folder):
    output = prepared("out", "--input", folder)
    (output / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar: the shard is missing"):
        prepared("out", "--input", folder)


COMMAND = "import sys, argparse; from data_prep import prepare as p; a = argparse.ArgumentParser(); \
p.add_arguments(a); p.run(a.parse_args())"


def kill_at(output, moment, arguments):
    """Prepare `output` and kill the command when `moment` exists and the manifest does not."""
    for _ in range(20):
        command = [sys.executable, "-c", COMMAND, *map(str, arguments), "--output", str(output)]
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(output.glob(moment)) and running.poll() is None:
            time.sleep(0.0005)
        running.kill()
        running.wait()
        if not (output / manifest.MANIFEST_FILE).exists():
            return
        shutil.rmtree(output)  # it finished before the kill; try again
    raise AssertionError("never killed in time")


SMALL = ["--sample-tokens", 512, "--shard-tokens", 512]


@pytest.fixture(scope="module")
def expected(shared_folder, tmp_path_factory) -> dict[str, bytes]:
    """The files of a preparation that was not killed."""
    return file_contents(prepare_small(tmp_path_factory.mktemp("expected") / "whole", "--input", shared_folder, *SMALL))


@pytest.mark.parametrize("moment", ["preparing.json", "work", "train-000004.tar.*.tmp", "validation-000000.tar"])
def test_killed_and_run_again_gives_the_same_bytes(prepared, shared_folder, expected, content, tmp_path, moment):
    settings = ["--input", shared_folder, *SMALL]
    output = tmp_path / "killed"
    kill_at(output, moment, [*settings, "--workers", 2, "--vocab-size", 300, "--held-out", 0.1])
    (output / "train-000999.tar").write_bytes(b"of an older version")
    assert content(prepared("killed", *settings)) == expected


def test_a_kill_between_manifest_and_the_note_is_repaired(prepared, folder, content):
    output = prepared("out", "--input", folder)
    before = content(output)
    (output / "preparing.json").write_text("{}")
    prepared("out", "--input", folder)
    assert content(output) == before


def test_an_unfinished_folder_of_other_settings_is_refused(prepared, folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_claim(output, {"text_field": "body"})
    with pytest.raises(UserError, match=r"was prepared with text_field body, not text"):
        prepared("out", "--input", folder)
    assert [path.name for path in output.iterdir()] == ["preparing.json"]


def test_after_a_mistake_finished_units_are_kept_and_the_corrected_inputs_continue_from_them(
    prepared, folder, content, monkeypatch
):
    monkeypatch.setattr("tandem.data_prep.work_units.MIN_UNIT_BYTES", 3_000)
    prepared("whole", "--input", folder)
    last = max(path for path in folder.rglob("*") if path.is_file())
    text = last.read_bytes()
    given = ["--input", folder, "--tokenizer", folder.parent / "whole" / "tokenizer.json"]
    expected = content(prepared("given", *given))
    last.write_bytes(b"\xff" + text[1:])
    with pytest.raises(
        UserError, match=r"is not UTF-8.*finished work is kept in .*out; run the same command again to continue"
    ):
        prepared("out", *given)
    output = folder.parent / "out"
    finished = {path: path.stat().st_mtime_ns for path in (output / "work").glob("*.json")}
    assert len(finished) > 3
    last.write_bytes(text)
    kept = {}
    finish = output_folder.finish_corpus

    def watched(*arguments):
        kept.update({path: path.stat().st_mtime_ns for path in finished})
        finish(*arguments)

    monkeypatch.setattr("tandem.data_prep.output_folder.finish_corpus", watched)
    assert content(prepared("out", *given)) == expected | {"inputs.json": (output / "inputs.json").read_bytes()}
    assert kept == finished


def test_units_of_another_version_of_the_work_format_are_encoded_again(prepared, folder, content, monkeypatch):
    given = ["--input", folder, "--tokenizer", prepared("whole", "--input", folder) / "tokenizer.json"]
    expected, gather, gathered = content(prepared("expected", *given)), shuffle.gather_shard, set()

    def stopped(*arguments, **options):
        raise UserError("stopped")

    def watched(output, work_folder, spills, *arguments, **options):
        gathered.update(spill.unit_name for spill in spills)
        gather(output, work_folder, spills, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(work_units, "WORK_FORMAT_VERSION", work_units.WORK_FORMAT_VERSION - 1)
        context.setattr(shuffle, "gather_shard", stopped)
        with pytest.raises(UserError, match="stopped"):
            prepared("out", *given)
    earlier = {path.stem for path in (folder.parent / "out" / "work").glob("*.json")}
    monkeypatch.setattr(shuffle, "gather_shard", watched)
    assert content(prepared("out", *given)) == expected
    assert earlier
    assert gathered
    assert not earlier & gathered


def test_a_changed_input_is_named_even_if_it_changes_how_the_others_are_cut(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 1000)
    monkeypatch.setattr(work_units, "TARGET_NUM_UNITS", 4)
    folder = tmp_path / "records"
    folder.mkdir()
    line = json.dumps({"text": "the row of a shard"}) + "\n"
    (folder / "kept.jsonl").write_text(line * 100)
    (folder / "shrinking.jsonl").write_text(line * 1000)
    arguments = ["--input", folder, "--held-out", 0]
    prepared("out", *arguments)
    os.utime(folder / "kept.jsonl")
    (folder / "shrinking.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"from other inputs: 0/shrinking.jsonl has changed \(changed files: 1\)"):
        prepared("out", *arguments)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "s3://bucket/x"])
def test_an_output_elsewhere_is_refused(address, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--output: {address} is not a local folder"):
        run_verb(prepare, "--output", address, "--input", folder)
    assert not any(":" in path.name for path in tmp_path.iterdir())


def test_a_refusal_names_the_setting_and_the_remedy(prepared, folder):
    output = prepared("out", "--input", folder, "--min-characters", 2)
    with pytest.raises(UserError, match=r"was prepared with min_characters 2, not 3; name another folder, or remove"):
        prepared("out", "--input", folder, "--min-characters", 3)
    next(output.glob("train-*.tar")).unlink()
    with pytest.raises(UserError, match=r"prepare the corpus again; remove .*out before a new preparation$"):
        prepared("out", "--input", folder, "--min-characters", 2)


def test_a_folder_of_a_version_with_other_settings_is_refused(folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_claim(output, {"cleaning": {"nfc": True, "shortest": 0}})
    claim = (output / output_folder.CLAIM_FILE).read_text()
    with pytest.raises(
        UserError, match=r"out was prepared by another version, which has other settings \(shortest\); name another"
    ):
        run_verb(prepare, "--output", output, "--input", folder)
    assert [file.read_text() for file in output.iterdir()] == [claim]


def test_a_manifest_that_no_reader_accepts_is_never_written(prepared, folder, monkeypatch):
    monkeypatch.setattr(shuffle, "entropy_nats", lambda token_counts: -1.0)
    with pytest.raises(UserError, match=r"manifest.json: unigram_entropy_nats: -1.0 is not a finite number at least 0"):
        prepared("out", "--input", folder)
    assert not (folder.parent / "out" / manifest.MANIFEST_FILE).exists()
    assert not list((folder.parent / "out").glob("tokenizer.json"))
