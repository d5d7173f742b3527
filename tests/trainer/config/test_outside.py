"""Files, JSON and YAML that others wrote are read within limits, and their text cannot control the terminal."""

import io
import logging
import os
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tandem.data_prep.tokenizers import build
from tandem.trainer import config, journal
from tandem.trainer.checkpoint import layout
from tandem.trainer.checkpoint.hf import folder as hf_folder
from tandem.trainer.checkpoint.hf import weight_files
from tandem.trainer.config import UserError, outside
from tandem.trainer.data import ledger, manifest, remote_files
from tandem.trainer.metrics import progress
from tandem.trainer.metrics.console import ConsoleSink
from tandem.trainer.runtime import process
from tandem.trainer.tools import generate
from tandem.trainer.tools.audit.ledger_history import LedgerHistory

DEMO = (Path(__file__).parents[3] / "configs" / "demo-btlm.yaml").read_text()
HOSTILE = "run\x1b[2J\x9b31m\r\x07\u202egnp.\u2028\udcff"
"""Clears the screen, colours, goes back, rings, reverses, and is not UTF-8."""
ESCAPED = r"run\x1b[2J\x9b31m\r\x07\u202egnp.\u2028\udcff"


@pytest.fixture
def pipe(tmp_path):
    """A pipe without a writer: opening it for reading would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


READERS = {
    "config": lambda folder: config.load_config(folder / "pipe"),
    "config of a run": lambda folder: outside.read_text(folder / "pipe"),
    "journal": lambda folder: list(journal.read_records(folder / "pipe")),
    "journal backwards": lambda folder: list(journal.read_records_backwards(folder / "pipe")),
    "shard or input": lambda folder: remote_files.open_file(folder / "pipe"),
    "small file": lambda folder: remote_files.read_bytes(folder / "pipe"),
    "hash": lambda folder: layout.file_sha256(folder / "pipe"),
    "checkpoint": lambda folder: outside.read_json(folder / "pipe"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused_at_every_door(pipe, reader):
    with pytest.raises(
        UserError, match=rf"^{pipe}: is a named pipe, but only regular files can be read; copy its content"
    ):
        READERS[reader](pipe.parent)


FOLDER_READERS = {
    "manifest.json": manifest.load_manifest,
    "config.json": lambda folder: hf_folder.read_json(folder / "config.json"),
    "model.safetensors.index.json": weight_files.open_tensor_files,
    "ledger.jsonl": lambda folder: ledger.read_rollbacks(folder, 0, 0),
    "tokenizer.json": lambda folder: build.read_tokenizer(str(folder)),
    "merges.txt": lambda folder: build.read_tokenizer(str(folder / "merges.txt")),
}


@pytest.mark.parametrize("name", FOLDER_READERS)
def test_a_folder_with_a_pipe_for_a_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        FOLDER_READERS[name](tmp_path)
    assert "\n" not in str(caught.value)


def test_an_audit_of_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError):
        LedgerHistory(tmp_path)


def test_devices_sockets_and_what_has_no_end_are_refused(tmp_path):
    with pytest.raises(UserError, match="/dev/zero: is a device, but only regular files"):
        outside.read_file("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(UserError, match="socket: is a socket, but only regular files"):
            outside.open_regular_file(tmp_path / "socket")
    endless = tmp_path / "manifest.json"
    with endless.open("wb") as file:
        file.truncate(1 << 42)  # sparse
    with pytest.raises(UserError, match=r"manifest.json: .*has more than 536,870,912 bytes"):
        manifest.load_manifest(tmp_path)
    with pytest.raises(FileNotFoundError):
        outside.open_regular_file(tmp_path / "none")


def test_a_line_of_a_journal_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "MAX_LINE_BYTES", 1_000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b" " * 999 + b"\n")
    assert list(journal.read_records(path)) == list(journal.read_records_backwards(path)) == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n')
    os.truncate(path, 1 << 42)  # sparse: one line of 4 TiB of zeros
    for read in (journal.read_records, journal.read_records_backwards):
        with pytest.raises(UserError, match=r"metrics.jsonl: has a line of more than 1,000 bytes, which is no record"):
            list(read(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "the key 'b' is given twice in one object"),
        ("1e999", "the number 1e999 is too large or not finite"),
        ("[NaN]", "the number NaN is too large or not finite"),
        ("-Infinity", "the number -Infinity is too large or not finite"),
        ("1" * 1_000_000, "4300 digits"),
    ],
)
def test_json_that_would_break_its_reader_is_a_value_error(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        outside.parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a.json: is not valid JSON \(.*{message}.*\); restore it"):
        outside.read_json(tmp_path / "a.json")
    assert journal.parse_record(text.encode()) == {}
    with pytest.raises(UserError, match=rf"m.json: is not a corpus manifest \(ValueError: .*{message}"):
        manifest.parse_manifest(text.encode(), "m.json")


LEVELS = range(1, 40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in LEVELS), "has aliases"),
        ("a0: xxxxxxxx\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in LEVELS), "has 78 interpolations"),
        ("a: &x [*x]", "nested too deeply"),
        ("a: " + "[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("a: " + "1" * 5_000, "4300 digits"),
        ("#" * (2 << 20), "has more than 1,048,576 bytes"),
        (DEMO.replace("seed: ", "seed: " + "9" * 30), r"run.seed: \d+ does not fit in 64 bits"),
        (DEMO.replace("beta1: ", "beta1: " + "9" * 400 + " # "), r"optim.beta1: 9+\.\.\. does not fit in 64 bits"),
    ],
)
def test_yaml_that_would_fill_the_memory_is_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        config.load_config(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_control_characters_are_escaped_and_all_other_text_is_kept():
    assert outside.escape_control_characters(HOSTILE) == ESCAPED
    assert outside.escape_control_characters("a\n\tb") == "a\n\tb"
    assert outside.escape_control_characters("a\nb", one_line=True) == r"a\nb"
    plain = "naïve 漢字 שלום 👩‍🚀 \\x1b"
    assert outside.escape_control_characters(plain, one_line=True) == plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_generated_text_cannot_control_a_terminal_and_reaches_a_file_as_it_is(monkeypatch):
    for stream, shown in ((Terminal(), f"{ESCAPED}\n\n"), (io.StringIO(), f"{HOSTILE}\n\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        generate.print_text(HOSTILE + "\n")
        assert stream.getvalue() == shown


def test_names_on_the_bar_and_the_console_are_neither_markup_nor_control_characters():
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    bar = progress.start_wide_bar(screen, f"[/b]{HOSTILE}", 2, words="[red]a\nb")
    bar.stop()
    ConsoleSink(1, screen)._print(f"end: [/b]{HOSTILE}")
    shown = screen.file.getvalue()
    assert shown.count(f"[/b]{ESCAPED}") >= 2
    assert r"[red]a\nb" in shown
    assert HOSTILE[:4] not in shown


def test_names_in_messages_of_the_log_stay_on_their_line(capsys):
    values = HOSTILE + "\n[rank 0] forged", 3, OSError("a\nb")
    record = logging.makeLogRecord({"msg": "%s and %d: %s\nsecond", "args": values})
    formatted = process.SafeFormatter("[rank 1] %(message)s").format(record)
    assert formatted == f"[rank 1] {ESCAPED}\\n[rank 0] forged and 3: a\\nb\nsecond"
    assert "\n" in record.args[0], "other handlers get the record as it was"
    hook = sys.excepthook
    try:
        process.escape_messages()
        sys.excepthook(RuntimeError, RuntimeError(HOSTILE), None)
    finally:
        sys.excepthook = hook
    assert capsys.readouterr().err == f"RuntimeError: {ESCAPED}\n"
