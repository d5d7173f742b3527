"""Every mistake of the user is one line, and leaves the machine as it was."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tandem.trainer.__main__ import main
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tests.data_prep.conftest import zstd_frame

ROOT = Path(__file__).resolve().parents[2]


def jsonl(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = '{"text": "good words"}'


def broken_inputs(root):
    """name -> (arguments, message) of every mistake in what is read."""
    root.mkdir()
    compressed = gzip.compress((GOOD + "\n").encode() * 500)
    (root / "cut.jsonl.gz").write_bytes(compressed[:-9])
    (root / "cut.jsonl.zst").write_bytes(zstd_frame((GOOD + "\n").encode() * 500)[:-4])
    (root / "none.jsonl.gz").write_bytes(b"plain text")
    (root / "bad.parquet").write_bytes(b"PAR1 no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), root / "null.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), root / "number.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), root / "body.parquet")
    (root / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("")
    (root / "not.json").write_text("[1]")
    (root / "scalar.json").write_text("1")
    (root / "words.txt").write_text("some words")
    (root / "noeos.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {
        "type": "WordLevel", "vocab": {"some": 0}, "unk_token": "some"}}))  # fmt: skip
    (root / "plain.json").write_text(json.dumps({"version": "1.0", "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel",
        "vocab": {"some": 0, "<|endoftext|>": 1}, "unk_token": "some"}}))  # fmt: skip
    words = ["--input", root / "words.txt"]
    return {
        "no such path": (["--input", root / "none"], "none does not exist"),
        "no files": (["--input", root / "empty"], "contains no file with a known suffix"),
        "no text": (["--input", root / "empty.txt"], "contains no text to train on"),
        "json": (["--input", jsonl(root / "a.jsonl", GOOD, "{")], r"a.jsonl:2: is not JSON"),
        "surrogate": (["--input", jsonl(root / "s.jsonl", '{"text": "\\ud800"}')], r"s.jsonl:1: is not JSON"),
        "list": (["--input", jsonl(root / "b.jsonl", "", GOOD, "[]")], r"b.jsonl:3: has no field 'text'"),
        "field": (["--input", jsonl(root / "c.jsonl", '{"body": "x"}')], r"c.jsonl:1: has .* \(its fields: body\)"),
        "null": (["--input", jsonl(root / "d.jsonl", '{"text": null}')], r"d.jsonl:1: .* is NoneType, not text"),
        "gz cut": (["--input", root / "cut.jsonl.gz"], r"cut.jsonl.gz:\d+: cannot be read \(Truncated"),
        "zst cut": (["--input", root / "cut.jsonl.zst"], r"cut.jsonl.zst:\d+: cannot be read \(Truncated"),
        "gz none": (["--input", root / "none.jsonl.gz"], r"none.jsonl.gz:1: cannot be read"),
        "parquet": (["--input", root / "bad.parquet"], r"bad.parquet: cannot be read"),
        "parquet null": (["--input", root / "null.parquet"], r"null.parquet: row 2: has no 'text'"),
        "parquet number": (["--input", root / "number.parquet"], r"number.parquet: field 'text' is int64, not text"),
        "parquet field": (["--input", root / "body.parquet"], r"body.parquet: has .* \(its fields: body\)"),
        "not utf-8": (["--input", root / "latin.txt"], r"latin.txt: is not UTF-8 .* at byte 2"),
        "tokenizer": ([*words, "--tokenizer", root / "not.json"], r"not.json: is not a tokenizer.json"),
        "no tokenizer": ([*words, "--tokenizer", root / "none.json"], r"none.json cannot be read"),
        "no eos": ([*words, "--tokenizer", root / "noeos.json"], r"noeos.json: has no token"),
        "plain eos": ([*words, "--tokenizer", root / "plain.json"], r"plain.json .*: its text yields"),
        "vocab": ([*words, "--vocab-size", 256], r"--vocab-size: 256 is too small; use more than 256"),
        "held out": ([*words, "--held-out", 1], r"--held-out: 1.0 is not a share; use at least 0 and less than 1"),
        "all held out": ([*words, "--held-out", 0.999999], r"--held-out: 0.999999 leaves none of 1 doc"),
        "workers": ([*words, "--workers", 0], r"--workers: 0 is too small; use 1 or more"),
        "samples": ([*words, "--sample-tokens", 100], r"--sample-tokens: 100 is not a positive multiple of 512"),
        "kind": (["--input", root / "not.json"], r"not.json: record 1: has no field 'text' .* --format text$"),
        "empty path": (["--input", ""], r"--input: a path is empty; name"),
        "glob": ([*words, "--glob", "/abs/*"], r"--glob: /abs/\* is an absolute path; use a pattern of names below"),
        "seed": ([*words, "--seed", 1 << 63], r"--seed: 9223372036854775808 does not fit in a signed 64-bit"),
        "low seed": ([*words, "--seed", -(1 << 63) - 1], r"--seed: -9223372036854775809 does not fit in a signed 64-bit"),
        "contaminants": ([*words, "--decontaminate", root / "none"], r"^--decontaminate: .*none does not exist"),
        "contaminant": ([*words, "--decontaminate", ""], r"^--decontaminate: a path is empty"),
        "contaminant kind": (
            [*words, "--decontaminate", root / "scalar.json"],
            r"^--decontaminate: .*scalar.json does not begin with JSON; give --format",
        ),
        "where": ([*words, "--where", "lang"], r"--where: 'lang' does not have the form NAME=VALUE"),
        "where nothing": ([*words, "--where", ""], r"--where: '' does not have the form NAME=VALUE"),
        "where no name": ([*words, "--where", "=x"], r"--where: '=x' does not have the form NAME=VALUE"),
        "empty text field": ([*words, "--text-field", ""], r"--text-field: the name is empty"),
        "empty group field": ([*words, "--group-field", ""], r"--group-field: the name is empty"),
        "where text": ([*words, "--where", "text=x"], r"--where: text is the text itself"),
        "group text": ([*words, "--group-field", "body.a", "--text-field", "body"], r"--group-field: body.a is the text"),
    }  # fmt: skip


def test_every_mistake_in_the_input_is_one_line_and_leaves_nothing(prepared, tmp_path):
    for name, (arguments, message) in broken_inputs(tmp_path / "in").items():
        with pytest.raises(UserError, match=message) as caught:
            prepared("made/out", *arguments)
        assert "\n" not in str(caught.value), name
        assert not (tmp_path / "made").exists(), name
        (tmp_path / "there").mkdir()
        with pytest.raises(UserError, match=message):
            prepared("there", *arguments)
        (tmp_path / "there").rmdir()


def test_text_that_is_not_utf8_can_be_left_out_and_is_counted(prepared, folder, capsys):
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    output = prepared("out", "--input", folder, "--skip-undecodable")
    assert manifest.load_manifest(output).counts["undecodable_files"] == 1
    assert "undecodable files left out: 1" in capsys.readouterr().out


def test_an_output_that_is_not_ours_or_cannot_be_written_is_refused_untouched(prepared, folder, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("years")
    with pytest.raises(UserError, match=r"--output: .*foreign contains files but no corpus"):
        prepared("foreign", "--input", folder)
    assert (tmp_path / "foreign" / "thesis.doc").read_text() == "years"
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=r"--output: .*file.* cannot be written"):
            prepared(name, "--input", folder)
    with pytest.raises(UserError, match=r"--output: /proc/none cannot be written"):
        prepared("/proc/none", "--input", folder)


def test_the_command_exits_with_2_and_one_line(tmp_path, folder):
    command = [sys.executable, "-m", "tandem.trainer", "prepare", "--output", str(tmp_path / "out"), "--input"]
    mistake = subprocess.run([*command, "/none"], cwd=ROOT, capture_output=True, text=True)
    assert (mistake.returncode, len(mistake.stderr.splitlines())) == (2, 1)
    small = ["--vocab-size", "300", "--workers", "1"]
    assert subprocess.run([*command, str(folder), *small], cwd=ROOT, capture_output=True).returncode == 0


def test_pipes_devices_and_hostile_names_are_one_line_and_exit_with_2(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "words.txt").write_text("some words")
    (tmp_path / "in" / "not.jsonl\x1b[2J\n\u202e.jsonl").write_text("not JSON\n")
    read_end, write_end = os.pipe()
    pipe, words = tmp_path / "pipe.txt", ["--input", tmp_path / "in" / "words.txt"]
    mistakes = [
        (["--input", pipe], f"{pipe}: is a named pipe"),
        (["--input", f"/dev/fd/{read_end}"], f"/dev/fd/{read_end}: is a named pipe"),
        (["--input", tmp_path], f"{pipe}: is a named pipe"),
        (["--input", "x{0..1000000000}.txt"], "x{0..1000000000}.txt stands for more than 1,000,000 paths"),
        (["--input", "x{a..z}{a..z}{a..z}{a..z}{a..z}.txt"], "stands for more than 1,000,000 paths"),
        (["--input", "/dev/zero"], "/dev/zero: is a device"),
        ([*words, "--tokenizer", pipe], f"{pipe}: is a named pipe"),
        (["--input", tmp_path / "in"], r"not.jsonl\x1b[2J\n\u202e.jsonl:1: is not JSON"),
        (["--input", "none\x1b[2J\r\nforged"], r"none\x1b[2J\r\nforged does not exist"),
    ]
    for arguments, message in mistakes:
        output = ["--output", tmp_path / "out", "--workers", 1]
        assert main(["prepare", *map(str, [*arguments, *output])]) == 2
        (line,) = capsys.readouterr().err.split("\n")[:-1]
        assert line.startswith("tandem: ")
        assert message in line
        assert line.isprintable()
    os.close(read_end)
    os.close(write_end)


def test_a_full_disk_is_one_line(prepared, folder, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", mount]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(UserError, match=r"--output: .* cannot be written \(.*No space"):
            prepared("small/out", "--input", folder)
        assert not list(mount.iterdir())
    finally:
        subprocess.run(["umount", mount], check=True)
