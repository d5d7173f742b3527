"""A start is refused only if the last ones failed at the same step."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tandem.trainer.config import UserError
from tandem.trainer.crash_loop import STARTS_FILE, record_start
from tandem.trainer.journal import TAIL_CHUNK_BYTES

FORKS = """
import os, signal, sys
from pathlib import Path
from tandem.trainer.crash_loop import record_start
print("torch" in sys.modules)
for name, ending in [argument.split("=", 1) for argument in sys.argv[2:]]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    with record_start(Path(sys.argv[1]) / name, 1):
        exec(ending)
"""
"""Ends one forked process in each way, so that they share the seconds of imports."""
ENDINGS = {
    "exit": "os._exit(0)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "hang": "sys.exit(85)",
    "error": "raise RuntimeError('loss nan')",
}


def reach(folder: Path, *steps: int) -> None:
    """Append records of these steps to the run folder."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"kind": "step", "step": step}) + "\n")
            file.write(json.dumps({"kind": "checkpoint", "step": 1}) + "\n")


def fail(folder: Path, max_repeat_failures: int = 3) -> None:
    with pytest.raises(RuntimeError, match="loss nan"), record_start(folder, max_repeat_failures):
        raise RuntimeError("loss nan")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / STARTS_FILE).read_text().splitlines()]


def refused(folder: Path, max_repeat_failures: int = 3) -> str:
    """Return the message of a refused start, which must record nothing."""
    before = (folder / STARTS_FILE).read_bytes()
    with pytest.raises(UserError) as refusal, record_start(folder, max_repeat_failures):
        raise AssertionError("entered")
    assert (folder / STARTS_FILE).read_bytes() == before
    return str(refusal.value)


def test_three_starts_that_fail_in_one_step_are_enough(tmp_path):
    for _ in range(3):
        fail(tmp_path)
        reach(tmp_path, 40, 41)
    assert refused(tmp_path) == (
        f"run.max_repeat_failures: 3 starts in a row have failed in step 42 of {tmp_path}; see the log for the cause; "
        "correct the cause, then start once with run.max_repeat_failures=0"
    )
    assert [record["reached"] for record in records(tmp_path)] == [0, 41, 41]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run per ending, and whether crash_loop imports torch."""
    folder = tmp_path_factory.mktemp("ended")
    endings = [f"{name}={ending}" for name, ending in ENDINGS.items()]
    done = subprocess.run(
        [sys.executable, "-uc", FORKS, folder, *endings], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return folder, done.stdout.decode()


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_ends_a_process_without_a_word_is_a_failure(ended, ending):
    folder = ended[0] / ending
    assert [record["kind"] for record in records(folder)] == ["start"]
    assert "the last start has failed in step 1" in refused(folder, 1)


@pytest.mark.parametrize(
    ("ending", "code"),
    [(None, 0), (UserError("data"), 2), (SystemExit(0), 0), (SystemExit(2), 2), (KeyboardInterrupt(), 130)],
)
def test_an_end_in_order_is_no_failure(tmp_path, ending, code):
    for _ in range(2):
        with pytest.raises(type(ending)) if ending else nullcontext(), record_start(tmp_path, 1):
            if ending:
                raise ending
    assert [(record["kind"], record.get("code")) for record in records(tmp_path)] == [
        ("start", None),
        ("end", code),
    ] * 2


def test_a_run_that_gets_further_between_failures_is_never_refused(tmp_path):
    for step in range(1, 9):
        fail(tmp_path, 2)
        reach(tmp_path, step)
    fail(tmp_path, 2)
    assert "failed in step 9" in refused(tmp_path, 2)


def test_an_end_in_order_between_failures_begins_the_count_anew(tmp_path):
    fail(tmp_path, 2)
    with record_start(tmp_path, 2):
        pass
    fail(tmp_path, 2)
    fail(tmp_path, 2)
    refused(tmp_path, 2)


def test_zero_refuses_nothing_and_forgets_what_failed(tmp_path):
    for _ in range(3):
        fail(tmp_path)
    refused(tmp_path)
    fail(tmp_path, 0)
    fail(tmp_path)
    fail(tmp_path)
    refused(tmp_path)


def test_the_run_is_where_the_last_record_says_not_at_its_highest_step(tmp_path):
    """A run that rolled back and failed before the old step is not at the old step."""
    fail(tmp_path, 2)
    reach(tmp_path, 40, 41)
    fail(tmp_path, 2)
    reach(tmp_path, 31, 32)
    fail(tmp_path, 2)
    assert [record["reached"] for record in records(tmp_path)] == [0, 41, 32]


def test_torn_lines_are_passed_over(tmp_path):
    fail(tmp_path, 2)
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"kind": "sta')
    reach(tmp_path, *range(1, 3000))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3000, "lo')
    fail(tmp_path, 2)
    reach(tmp_path)
    lines = (tmp_path / STARTS_FILE).read_text().splitlines()
    assert [line[:14] for line in lines] == ['{"kind": "star', '{"kind": "sta', '{"kind": "star']
    assert json.loads(lines[-1])["reached"] == 2999
    assert "failed in step 3000" in refused(tmp_path, 2)


def test_a_long_file_without_steps_is_read_to_its_beginning(tmp_path):
    reach(tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "validation", "step": 7}\n' * 9000)
    fail(tmp_path)
    assert records(tmp_path)[0]["reached"] == 7


@pytest.mark.parametrize("past", [0, 1, 20, 10_000])
def test_a_line_is_read_whole_wherever_the_file_is_cut_in_reading(tmp_path, past):
    reach(tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"{}".ljust(TAIL_CHUNK_BYTES - file.tell() + past) + b"\n")
    fail(tmp_path)
    assert records(tmp_path)[0]["reached"] == 7


def test_the_verdict_of_the_last_hang_is_told_and_no_older_one(tmp_path):
    verdict = tmp_path / "hangs" / "step-00000001" / "verdict.txt"
    verdict.parent.mkdir(parents=True)
    verdict.write_text("step 1: rank 1 on host-b is still in data\n")
    os.utime(verdict, (1, 1))
    fail(tmp_path, 1)
    assert "see the log for the cause" in refused(tmp_path, 1)
    os.utime(verdict, 2 * (time.time(),))  # the clock of time.time(), which the records use
    assert (
        "; the verdict on the last hang was: step 1: rank 1 on host-b is still in data; correct the cause"
        in refused(tmp_path, 1)
    )


def test_two_launches_in_one_folder_do_not_end_one_another(tmp_path):
    first = record_start(tmp_path, 1)
    first.__enter__()
    fail(tmp_path, 0)
    first.__exit__(None, None, None)
    assert [record["kind"] for record in records(tmp_path)] == ["start", "start", "end"]
    assert "failed in step 1" in refused(tmp_path, 1)


def test_a_folder_that_cannot_be_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^run.root: .* cannot be created \(Not a directory\); name a folder you can write to$"
    ):
        record_start(tmp_path / "file" / "run", 3).__enter__()
    (tmp_path / STARTS_FILE).mkdir()
    with pytest.raises(UserError, match=r"attempts.jsonl: cannot be written \(Is a directory\)"):
        record_start(tmp_path, 0).__enter__()


def test_it_needs_no_torch(ended):
    assert ended[1] == "False\n"


def would_refuse(folder: Path, content: bytes, max_repeat_failures: int) -> bool:
    """Whether a start is refused if its journal has this content."""
    (folder / STARTS_FILE).write_bytes(content)
    start = record_start(folder, max_repeat_failures)
    try:
        start.__enter__()
    except UserError:
        return True
    start.__exit__(None, None, None)
    return False


@pytest.fixture(scope="module")
def journals(tmp_path_factory) -> dict[str, tuple[Path, bytes, int]]:
    """Folder, journal and limit of a run that must be refused, of one that progresses, and of one that ended in order."""
    root = tmp_path_factory.mktemp("journals")
    for _ in range(3):
        fail(root / "stuck")
        reach(root / "stuck", 40, 41)
    for step in (10, 20):
        fail(root / "progresses", 2)
        reach(root / "progresses", step)
    with record_start(root / "ended", 1):
        reach(root / "ended", 7)
    limits = {"stuck": 3, "progresses": 2, "ended": 1}
    return {name: (root / name, (root / name / STARTS_FILE).read_bytes(), limit) for name, limit in limits.items()}


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("name", ["stuck", "progresses"])
def test_a_wrong_bit_refuses_no_run_that_progresses_and_delays_a_refusal_by_at_most_one_start(
    journals, name, every, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is lost here
    folder, content, limit = journals[name]
    assert would_refuse(folder, content, limit) == (name == "stuck")
    line_ends = {8 * match.start() + bit for match in re.finditer(rb"[{}\n]", content) for bit in range(8)}
    for index in sorted({*range(0, 8 * len(content), every), *line_ends}):
        changed = bytearray(content)
        changed[index // 8] ^= 1 << index % 8
        one_start_later = (
            bytes(changed) + b"\n" + content.splitlines(keepends=True)[-1] if name == "stuck" else bytes(changed)
        )
        assert would_refuse(folder, one_start_later, limit) == (name == "stuck"), f"bit {index}: {one_start_later}"


@pytest.mark.parametrize(
    "damage", [b"damaged", b"{}", b"[1]", b'{"kind": "start"}', b"\xff" * 9, b'"', b"{" * 99_999 + b"}"]
)
def test_a_damaged_line_counts_as_a_failed_start_at_the_step_before_it(journals, damage):
    folder, content, limit = journals["stuck"]
    lines = content.splitlines(keepends=True)
    assert would_refuse(folder, lines[0] + lines[1] + damage + b"\n", limit), "at the step of the line before"
    assert would_refuse(folder, content + damage, limit)
    assert not would_refuse(folder, lines[0] + damage + b"\n" + lines[2], limit), "it may have failed at another step"
    assert would_refuse(folder, lines[0] + damage + b"\n" + lines[2] + lines[2], limit), "one start later"
    folder, content, limit = journals["progresses"]
    assert not would_refuse(folder, content + damage, limit)


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "start", "id": "01', b"\0" * 4096])
def test_a_line_that_was_torn_before_its_start_began_does_not_count(journals, torn):
    folder, content, _ = journals["ended"]
    assert not would_refuse(folder, content + torn, 1)
    assert not would_refuse(folder, content + torn + b"\n" + torn, 1)
    assert would_refuse(journals["stuck"][0], journals["stuck"][1] + torn, 3)


def test_records_without_a_check_sum_count_as_before(journals):
    folder, content, limit = journals["stuck"]
    older = re.sub(rb', "check": "\w{8}"', b"", content)
    assert older.count(b"check") == 0 < older.count(b'"reached": 41')
    assert would_refuse(folder, older, limit)
    assert not would_refuse(folder, older.splitlines(keepends=True)[0], limit)


def test_a_journal_that_cannot_be_read_is_named(tmp_path):
    for name in ("metrics.jsonl", STARTS_FILE):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(Is a directory\)"):
            record_start(tmp_path, 3).__enter__()
        (tmp_path / name).rmdir()


@pytest.mark.parametrize("step", ['"41"', "-1", "true", "4.0", "null", "[]"])
def test_a_metrics_record_without_a_step_is_passed_over(tmp_path, step):
    reach(tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"kind": "step", "step": {step}}}\n')
    fail(tmp_path)
    assert records(tmp_path)[0]["reached"] == 7


@pytest.mark.parametrize("content", [b"\xff\xfe \x1b[2J", b"x" * (1 << 17), None])
def test_a_strange_verdict_stops_no_refusal(tmp_path, content):
    verdict = tmp_path / "hangs" / "step-00000001" / "verdict.txt"
    verdict.parent.mkdir(parents=True)
    fail(tmp_path, 1)
    verdict.mkdir() if content is None else verdict.write_bytes(content)
    os.utime(verdict, 2 * (time.time() + 9,))
    message = refused(tmp_path, 1)
    assert "failed in step 1" in message
    assert "\x1b" not in message


def test_a_pipe_in_place_of_the_metrics_is_named(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    message = rf"^{tmp_path}/metrics.jsonl: is a named pipe"
    with pytest.raises(UserError, match=message), record_start(tmp_path, 3):
        pass
