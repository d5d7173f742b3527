"""A disk that is full, takes nothing, is slow or lies: the run says so in one line and goes on; no half of a save counts."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from tandem.trainer import checkpointing, train
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    MANIFEST_FILE,
    list_checkpoints,
    list_committed,
    step_folder_name,
)
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.checkpointing import RETRY_DIVISOR
from tandem.trainer.config import TrainConfig, parse_dataclass
from tandem.trainer.distributed import watchdog
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.metrics.records import Sinks
from tandem.trainer.startup import build_engine
from tests import ranks, tiny_configs
from tests.promises.conftest import differing_tensors, read_step_records, two_phase_config, wait_for_exit
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 30
"""Of each phase."""
SAVE_BYTES = 2_300_000
"""Of one checkpoint of the tiny model, rounded up."""
DISK_BYTES = 5 * SAVE_BYTES // 2
OLDER, NEWER = 56, 58
"""Steps of the checkpoints of a stopped run, late in it: each test of a damaged one then makes a few steps only."""
SLOW_SYNC_SECONDS = 0.02
SAVES, LARGE = 12, {"hidden_size": 512, "num_layers": 2, "ffn_hidden_size": 1024, "num_heads": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp("damage")
    tree = two_phase_config(
        "stablelm",
        corpus,
        root / "runs",
        steps=STEPS,
        run={"max_repeat_failures": 0},
        checkpoint={"every_steps": 1, "keep_last": 1},
    )
    for phase in tree["schedule"]["phases"]:
        phase["micro_batch_size"] = phase["global_batch_size"]  # disks see saves, not micro-batches
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module")
def straight(config) -> Path:
    """The run whose disk is in order."""
    assert wait_for_exit(begin(config, "straight", "checkpoint.every_steps=20", "checkpoint.keep_last=0")) == 0
    return folder_of(config, "straight")


def folder_of(config: Path, name: str) -> Path:
    return config.parent / "runs" / name


def begin(config: Path, name: str, *overrides: str, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """The run in a fork, after `prepare`; what it says is appended to `<name>.log` beside the config."""
    command = ["train", str(config), f"run.name={name}", *overrides]
    process = FORKSERVER.Process(target=_run, args=(command, config.parent / f"{name}.log", prepare))
    process.start()
    return process


def _run(command: list[str], log: Path, prepare: Callable[[], object] | None) -> None:
    from jaxtyping import config

    config.update("jaxtyping_disable", True)  # as in a command
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if prepare:
        prepare()
    sys.exit(main(command))


def said(config: Path, name: str, words: str) -> list[str]:
    """Lines with these words."""
    log = config.parent / f"{name}.log"
    return [line for line in log.read_text().splitlines() if words in line] if log.exists() else []


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + TEST_TIMEOUT_SECONDS
    while not condition():
        assert process.exitcode is None, f"ended with {process.exitcode} before it was to"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def newest_step(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in list_committed(folder / "checkpoints")), default=0)


def is_the_straight_run(folder: Path, straight: Path) -> None:
    one, other = read_step_records(straight), read_step_records(folder)
    assert sorted(other) == list(range(1, 2 * STEPS + 1))
    assert [other[step]["loss"] for step in sorted(other)] == [one[step]["loss"] for step in sorted(one)]
    assert differing_tensors(open_checkpoint(straight), open_checkpoint(folder)) == []
    assert main(["audit", str(folder)]) == 0


@pytest.fixture
def mounted() -> Iterator[Callable[..., None]]:
    """mounted(folder, "-t", "tmpfs", ...): something is mounted there until the test ends; skips where that is not allowed."""
    folders: list[Path] = []

    def mount(folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no mount: {done.stderr.strip()}")
        folders.append(folder)

    if os.geteuid():
        pytest.skip("only root mounts")
    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(mounted) -> Callable[[Path], Path]:
    """A file system for the checkpoints of a run: one fits beside the one before it. Returns a file that fills it."""

    def make(folder: Path) -> Path:
        mounted(folder / "checkpoints", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs")
        filler = folder / "checkpoints" / "filler"
        filler.write_bytes(bytes(SAVE_BYTES))
        return filler

    return make


def read_only(folder: Path, value: bool) -> None:
    """The file system mounted there takes nothing, or takes writes again."""
    deadline = time.monotonic() + TEST_TIMEOUT_SECONDS
    while subprocess.run(
        ["mount", "-o", f"remount,{'ro' if value else 'rw'}", str(folder)], capture_output=True, check=False
    ).returncode:  # busy: a save has a file open
        assert time.monotonic() < deadline


def test_a_full_disk_is_one_line_for_each_save_and_saving_goes_on_when_there_is_room(config, straight, small_disk):
    name = "full"
    folder = folder_of(config, name)
    filler = small_disk(folder)
    process = begin(config, name)
    wait_until(lambda: len(said(config, name, "cannot be written")) >= 2, process)
    assert newest_step(folder) == 1, "the first fitted"
    assert (folder / "checkpoints" / step_folder_name(1) / COMMIT_MARKER).exists()
    filler.unlink()
    assert wait_for_exit(process) == 0
    lines = said(config, name, "cannot be written")
    assert lines[0].startswith("[rank 0] ")
    assert f"{folder / 'checkpoints'}: the checkpoint of step 2 cannot be written" in lines[0]
    assert "No space left on device" in lines[0]
    assert re.search(r"the disk has [\d.,]+ [KMGT]iB left", lines[0])
    assert said(config, name, "Traceback") == []
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [step_folder_name(2 * STEPS)], (
        "nothing torn is left"
    )
    is_the_straight_run(folder, straight)


def room_once_told(filler: Path) -> None:
    """There is room from the moment on at which the run says that there is none."""
    tell = checkpointing.save_error_message

    def told(*facts: Any) -> str:
        words = tell(*facts)
        filler.unlink()
        return words

    checkpointing.save_error_message = told


def test_a_save_that_failed_is_made_again_once_and_some_steps_later(config, small_disk):
    name = "again"
    folder = folder_of(config, name)
    filler = small_disk(folder)
    filler.write_bytes(bytes(2 * SAVE_BYTES))
    process = begin(config, name, f"checkpoint.every_steps={STEPS}", prepare=partial(room_once_told, filler))
    assert wait_for_exit(process) == 0
    assert len(said(config, name, "cannot be written")) == 1
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    saved = [line["step"] for line in lines if line["kind"] == "checkpoint"]
    assert len(saved) == 2, "one for the one that failed, one at the end"
    assert STEPS + STEPS // RETRY_DIVISOR <= saved[0] < saved[1] == 2 * STEPS


@pytest.mark.parametrize("wrong", ["full", "read-only"])
def test_a_last_save_that_cannot_be_made_is_one_line_and_exit_code_2_and_the_next_start_goes_on(
    wrong, config, straight, small_disk
):
    name = f"last-{wrong}"
    folder = folder_of(config, name)
    filler = small_disk(folder)
    if wrong == "read-only":
        filler.unlink()
        process = begin(config, name)
        wait_until(lambda: newest_step(folder) >= 2, process)
        read_only(folder / "checkpoints", True)
    else:
        process = begin(config, name)
    assert wait_for_exit(process) == 2
    last = said(config, name, "tandem: ")
    assert len(last) == 1
    assert f"the checkpoint of step {2 * STEPS} cannot be written" in last[0]
    assert last[0].endswith("and start again: the run continues from the previous checkpoint")
    first, _ = said(config, name, f"the checkpoint of step {2 * STEPS} cannot be written")
    assert first.endswith("writable now, because the run is about to end and save once more")
    assert ("No space left on device" if wrong == "full" else "Read-only file system") in last[0]
    assert said(config, name, "Traceback") == []
    before = newest_step(folder)
    assert 1 <= before < 2 * STEPS
    if wrong == "read-only":
        read_only(folder / "checkpoints", False)
    else:
        filler.unlink()
    assert wait_for_exit(begin(config, name)) == 0
    assert said(config, name, "resumed at step")[0].startswith(f"resumed at step {before} ")
    is_the_straight_run(folder, straight)


def test_a_folder_that_is_read_only_for_a_while_is_saved_into_afterwards(config, straight, small_disk):
    name = "read-only"
    folder = folder_of(config, name)
    small_disk(folder).unlink()
    process = begin(config, name)
    wait_until(lambda: newest_step(folder) >= 2, process)
    read_only(folder / "checkpoints", True)
    wait_until(lambda: len(said(config, name, "cannot be written")) >= 2, process)
    read_only(folder / "checkpoints", False)
    assert wait_for_exit(process) == 0
    assert "Read-only file system" in said(config, name, "cannot be written")[0]
    assert said(config, name, "Traceback") == []
    is_the_straight_run(folder, straight)


def test_a_limit_on_the_size_of_files_is_said_and_goes_by(config, straight):
    name = "limited"
    folder = folder_of(config, name)
    process = begin(config, name)
    assert process.pid
    wait_until(lambda: newest_step(folder) >= 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SAVE_BYTES // 2, resource.RLIM_INFINITY))
    wait_until(lambda: len(said(config, name, "cannot be written")) >= 2, process)
    assert newest_step(folder) >= 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert wait_for_exit(process) == 0
    assert "File too large" in said(config, name, "cannot be written")[0]
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [step_folder_name(2 * STEPS)], (
        "nothing torn is left"
    )
    is_the_straight_run(folder, straight)


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(config, straight, mounted):
    """Somebody keeps it: a mount that takes no writes."""
    name = "kept"
    folder = folder_of(config, name)
    assert wait_for_exit(begin(config, name, "run.stop_step=2")) == 0
    old = folder / "checkpoints" / step_folder_name(2)
    mounted(old, "--bind", str(old))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(old)], check=True)
    assert wait_for_exit(begin(config, name, "checkpoint.every_steps=10")) == 0
    lines = said(config, name, "cannot be removed")
    assert lines
    assert f"{old} cannot be removed: " in lines[0]
    assert [path.name for path in list_committed(folder / "checkpoints")] == [old.name, step_folder_name(2 * STEPS)]
    is_the_straight_run(folder, straight)


def flip(path: Path, place: int = -1) -> None:
    """The highest bit of one byte, by default of the middle one, is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 0x80
    path.write_bytes(content)


def data(folder: Path) -> Path:
    return next(folder.glob("rank-*"))


def unreadable(path: Path) -> None:
    """Its disk gives an error of input and output: nothing can be read at the beginning of this process's memory."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "data truncated": (lambda folder: os.truncate(data(folder), 100_000), "rank-00000.safetensors is missing or"),
    "data flipped": (lambda folder: flip(data(folder)), "rank-00000.safetensors has changed"),
    "data missing": (lambda folder: data(folder).unlink(), "rank-00000.safetensors is missing"),
    "manifest truncated": (lambda folder: os.truncate(folder / MANIFEST_FILE, 100), "manifest.json is not the one"),
    "manifest flipped": (lambda folder: flip(folder / MANIFEST_FILE), "manifest.json is not the one"),
    "manifest missing": (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json cannot be read"),
    "manifest unreadable": (lambda folder: unreadable(folder / MANIFEST_FILE), "manifest.json cannot be read"),
    "marker flipped": (lambda folder: flip(folder / COMMIT_MARKER), "manifest.json is not the one"),
    "marker empty": (lambda folder: os.truncate(folder / COMMIT_MARKER, 0), "manifest.json is not the one"),
    "marker gone": (lambda folder: (folder / COMMIT_MARKER).unlink(), ""),
}


@pytest.fixture(scope="module")
def stopped(config, straight) -> Path:
    """A run that has stopped at step `OLDER` and at step `NEWER` of 60, with a checkpoint of each."""
    folder = folder_of(config, "stopped")
    for step in (OLDER, NEWER):
        stop = ("checkpoint.every_steps=0", "checkpoint.keep_last=0", f"run.stop_step={step}")
        assert wait_for_exit(begin(config, "stopped", *stop)) == 0
    committed = [path.name for path in list_committed(folder / "checkpoints")]
    assert committed == [step_folder_name(OLDER), step_folder_name(NEWER)]
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_continued(kind, config, straight, stopped):
    spoil, words = DAMAGES[kind]
    name = kind.replace(" ", "-")
    folder = shutil.copytree(stopped, folder_of(config, name))
    damaged = folder / "checkpoints" / step_folder_name(NEWER)
    spoil(damaged)
    assert wait_for_exit(begin(config, name, "checkpoint.every_steps=2", "checkpoint.keep_last=0")) == 0
    lines = said(config, name, "is damaged")
    if words:
        assert len(lines) == 1
        assert f"{damaged} is damaged ({words}" in lines[0]
    else:
        assert lines == [], "without a marker it was never committed"
    assert said(config, name, "resumed at step")[0].startswith(f"resumed at step {OLDER} ")
    assert said(config, name, "Traceback") == []
    is_the_straight_run(folder, straight)


def test_a_checkpoint_that_was_passed_over_does_not_count_and_no_whole_one_is_removed_for_it(config, stopped, capsys):
    folder = shutil.copytree(stopped, folder_of(config, "passed-over"))
    root = folder / "checkpoints"
    spoil, _ = DAMAGES["data flipped"]
    spoil(root / step_folder_name(NEWER))
    every = ("checkpoint.every_steps=0", "checkpoint.keep_last=2")
    assert wait_for_exit(begin(config, "passed-over", *every, "run.stop_step=57")) == 0
    assert [path.name for path in list_committed(root)] == [step_folder_name(OLDER), step_folder_name(57)]
    assert main(["checkpoint", "ls", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["state"]) for row in listed] == [
        (OLDER, "committed"), (57, "committed"), (NEWER, "rejected"),
    ]  # fmt: skip
    assert wait_for_exit(begin(config, "passed-over", *every, "run.stop_step=59")) == 0
    assert [path.name for path in list_checkpoints(root)] == [step_folder_name(57), step_folder_name(59)]


def test_of_checkpoints_that_are_all_damaged_none_is_continued_and_no_run_begins(config, stopped):
    folder = shutil.copytree(stopped, folder_of(config, "all"))
    first, second = list_committed(folder / "checkpoints")
    flip(data(first))
    flip(second / COMMIT_MARKER)
    before = (folder / "metrics.jsonl").read_bytes()
    assert wait_for_exit(begin(config, "all")) == 2
    [refusal] = said(config, "all", "tandem: ")
    assert f"{folder / 'checkpoints'}: no undamaged checkpoint is left to continue from (damaged: 2)" in refusal
    assert said(config, "all", "Traceback") == []
    assert (folder / "metrics.jsonl").read_bytes() == before


def slow_disk(seconds: float = SLOW_SYNC_SECONDS) -> None:
    """In the fork: every file and folder takes a while to be on disk."""
    sync = os.fsync

    def slow(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = slow


def test_a_save_that_is_due_before_the_last_one_is_written_waits_and_none_is_left_out(config):
    """A save takes a dozen syncs here, and a step less than that: the training has to wait for its disk."""
    folder = folder_of(config, "slow")
    assert wait_for_exit(begin(config, "slow", "checkpoint.keep_last=0", "run.stop_step=12", prepare=slow_disk)) == 0
    assert [path.name for path in list_committed(folder / "checkpoints")] == [
        step_folder_name(step) for step in range(1, 13)
    ]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "checkpoint"]
    assert [save["step"] for save in saves] == list(range(1, 13))
    assert all(save["seconds"] >= 5 * SLOW_SYNC_SECONDS for save in saves)
    begins = [folder_.stat().st_ctime_ns for folder_ in list_committed(folder / "checkpoints")]
    assert sum(save["stall_seconds"] for save in saves[1:]) > 0
    assert begins == sorted(begins)


def test_a_disk_that_takes_longer_than_a_step_may_is_no_hang(config):
    """In a save that the next one waits for, and in the last, which all wait for."""
    limit_seconds = 2.5
    overrides = ("checkpoint.every_steps=5", "run.stop_step=11", f"watchdog.step_timeout_seconds={limit_seconds}")
    assert wait_for_exit(begin(config, "patient", *overrides, prepare=partial(slow_disk, 50 * SLOW_SYNC_SECONDS))) == 0
    folder = folder_of(config, "patient")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saves = {record["step"]: record for record in records if record["kind"] == "checkpoint"}
    assert list(saves) == [5, 10, 11]
    assert min(saves[step]["stall_seconds"] for step in (10, 11)) > 2 * limit_seconds
    assert not (folder / "hangs").exists()


def dies_after_its_part(tree: dict) -> None:
    """Rank 1 is killed when its file is written, while rank 0's disk takes longer than a wait for one that is gone."""
    watchdog.GONE_PEER_TIMEOUT_SECONDS = 1.0
    wait, sync = CheckpointSaver.wait_until_written, os.fsync

    def killed(saver: CheckpointSaver) -> None:
        wait(saver)
        os.kill(os.getpid(), signal.SIGKILL)

    def slow(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".safetensors"):
            time.sleep(5)
        sync(file)

    if dist.get_rank() == 1:
        CheckpointSaver.wait_until_written = killed  # type: ignore[method-assign]
    else:
        os.fsync = slow
    train.run(parse_dataclass(TrainConfig, tree, ""))


def test_a_rank_that_is_killed_after_its_part_costs_no_save(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 60)
    tree = two_phase_config("stablelm", corpus, tmp_path / "runs", run={"stop_step": 3}, checkpoint={"every_steps": 0})
    with pytest.raises(AssertionError, match=f"rank 1 gave no result .exit code {-signal.SIGKILL}"):
        ranks.run(dies_after_its_part, 2, tmp_path, tree)
    assert [path.name for path in list_committed(tmp_path / "runs" / "tiny" / "checkpoints")] == [step_folder_name(3)]


def slow_goodbye() -> None:
    close = Sinks.close

    def slowly(sinks: Sinks) -> None:
        time.sleep(5)
        close(sinks)

    Sinks.close = slowly  # type: ignore[method-assign]


def test_a_server_that_takes_the_last_records_slowly_is_no_hang(config):
    overrides = ("checkpoint.every_steps=0", "run.stop_step=3", "watchdog.step_timeout_seconds=3.0")
    assert wait_for_exit(begin(config, "goodbye", *overrides, prepare=slow_goodbye)) == 0
    assert not (folder_of(config, "goodbye") / "hangs").exists()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def save_again_and_again(root: Path) -> dict[str, object]:
    """Resident memory after each of many saves of a state of some tens of MB, the copies that were kept, what two saves say."""
    model = tiny_configs.STABLELM | LARGE
    config = tiny_configs.make_config("stablelm", model=model)
    with mesh_context(1) as mesh:
        engine = build_engine(config, mesh, None)
        engine.allocate_moments(0)
        saver = CheckpointSaver(root, mesh, 1)
        after = [resident_bytes()]
        for step in range(1, SAVES + 1):
            saver.start_save(step, engine, {}, before_commit=lambda: time.sleep(0.05))
            try:
                saver.start_save(step + 1, engine, {})
                second = "begun"
            except AssertionError:
                second = "refused"
            outcome = saver.wait_for_result()
            assert outcome.error is None
            after.append(resident_bytes())
        state = sum(3 * fragment.master.nbytes for fragment in engine.optimizer_fragments())
        return {"after": after, "state": state, "second": second, "left": len(list_committed(root))}


def test_many_saves_hold_one_copy_of_the_state_and_never_two_at_once(tmp_path):
    (facts,) = ranks.run(save_again_and_again, 1, tmp_path, tmp_path / "checkpoints")
    after, state = facts["after"], facts["state"]
    assert state > 40_000_000
    assert facts["second"] == "refused"
    assert facts["left"] == 1
    # What is not the copy: the interpreter's and torch's own for the first save, half a copy at most.
    assert after[1] - after[0] < 1.5 * state
    assert after[-1] - after[1] < 0.1 * state, "no growth from save to save"


def save_what_cannot_be_written(root: Path) -> str:
    """What a rank's thread met, and what the ranks were told, when rank 0's is wrong in a way that no disk is."""
    with mesh_context(2) as mesh:
        engine = build_engine(tiny_configs.make_config("stablelm", parallel={"tp_size": 2}), mesh, None)
        engine.allocate_moments(0)
        saver = CheckpointSaver(root, mesh, 1)
        saver.start_save(1, engine, {"no JSON": torch.zeros(1)})
        try:
            outcome = saver.wait_for_result()
        except TypeError as error:
            return f"raised {error}"
        return f"told {outcome.error}"


def test_an_error_that_is_none_of_the_disk_is_raised_where_it_was_met_and_told_to_the_other_ranks(tmp_path):
    zero, one = ranks.run(save_what_cannot_be_written, 2, tmp_path, tmp_path / "checkpoints")
    assert zero.startswith("raised ")
    assert "not JSON serializable" in zero
    assert one.startswith("told rank 0: TypeError: ")
    assert list_committed(tmp_path / "checkpoints") == []
