"""Whatever ends a run, the same command continues it to the bits of the run that nothing ended."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.layout import COMMIT_MARKER, MANIFEST_FILE, list_committed
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.runtime import signals
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests.promises.conftest import (
    clean_environment,
    differing_tensors,
    fork_tandem,
    has_signal_handler,
    read_step_records,
    two_phase_config,
    wait_for_exit,
)
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 60
"""Of each phase: long enough for a signal to come in the middle, about two seconds."""
KILLS = 6
GRACE_SECONDS = 1.0
ROOT = Path(__file__).parents[2]


def started(config: Path, *overrides: str) -> BaseProcess:
    """A fork, for a run that is killed six times would spend a minute on imports."""
    return fork_tandem(["train", config, *overrides])


def said(process: subprocess.Popen[str]) -> str:
    """What it wrote to stderr until it ended."""
    try:
        return process.communicate(timeout=TEST_TIMEOUT_SECONDS)[1]
    finally:
        process.kill()


def wait_until(condition: Callable[[], bool], process: BaseProcess | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TEST_TIMEOUT_SECONDS
    while not condition():
        code = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        if code is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("waited in vain" if code is None else f"ended with {code} before the signal")
        time.sleep(0.001)


def last_step(folder: Path) -> int:
    return max(read_step_records(folder), default=0) if (folder / "metrics.jsonl").is_file() else 0


def is_the_straight_run(folder: Path, straight: Path) -> None:
    one, other = read_step_records(straight), read_step_records(folder)
    assert sorted(other) == list(range(1, 2 * STEPS + 1))
    assert [other[step]["loss"] for step in sorted(other)] == [one[step]["loss"] for step in sorted(one)]
    assert open_checkpoint(folder).manifest["cursor"] == open_checkpoint(straight).manifest["cursor"]
    assert main(["audit", str(folder)]) == 0
    assert differing_tensors(open_checkpoint(straight), open_checkpoint(folder)) == []


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp("signals")
    tree = two_phase_config(
        "stablelm", corpus, root / "runs", steps=STEPS, checkpoint={"every_steps": 50, "keep_last": 2}
    )
    for phase in tree["schedule"]["phases"]:
        phase["micro_batch_size"] = phase["global_batch_size"]
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module")
def straight(config) -> Path:
    """The run that nothing ended."""
    assert wait_for_exit(started(config)) == 0
    return config.parent / "runs" / "tiny"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_the_step_leaves_with_85_and_the_same_command_goes_on(number, config, straight):
    """Ctrl-C is sent to a command; `test_signal_windows` sends the other signals to one."""
    folder = config.parent / "runs" / number.name
    command = ["train", str(config), f"run.name={number.name}"]
    if number == signal.SIGINT:
        typed = [sys.executable, "-m", "tandem.trainer", *command]
        process = subprocess.Popen(typed, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: last_step(folder) >= 20, process)
        process.send_signal(number)
        errors = said(process)
        assert process.returncode == REQUEUE_EXIT_CODE, errors
    else:
        fork = fork_tandem(command)
        wait_until(lambda: last_step(folder) >= 20, fork)
        os.kill(fork.pid, number)
        assert wait_for_exit(fork) == REQUEUE_EXIT_CODE
    stopped = last_step(folder)
    assert 20 <= stopped < 2 * STEPS
    assert open_checkpoint(folder).step == stopped
    assert wait_for_exit(started(config, f"run.name={number.name}")) == 0
    is_the_straight_run(folder, straight)


@pytest.mark.parametrize("place", ["anywhere", "in a save"])
def test_sigkill_at_any_moment_loses_no_bit(place, config, straight):
    folder = config.parent / "runs" / place.replace(" ", "-")
    overrides = (f"run.name={folder.name}", "checkpoint.every_steps=1")
    draw = random.Random(place)
    for _ in range(KILLS):
        process, until = started(config, *overrides), last_step(folder) + draw.randrange(1, 9)
        wait_until(lambda until=until: last_step(folder) >= until, process)
        if place == "in a save":
            wait_until(lambda: is_saving(folder), process)
        else:
            time.sleep(draw.uniform(0, 0.1))
        process.kill()
        assert wait_for_exit(process) == -signal.SIGKILL
    half_removed = list_committed(folder / "checkpoints")[0]
    (half_removed / "COMMITTED").unlink()
    assert wait_for_exit(started(config, *overrides)) == 0
    is_the_straight_run(folder, straight)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [path.name for path in list_committed(folder / "checkpoints")], (
        "what kills had torn is cleared away"
    )
    assert len(names) == 2


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint has been begun and is not committed."""
    newest = max((folder / "checkpoints").glob("step-*"), default=None)
    return newest is not None and not (newest / "COMMITTED").exists()


def test_a_signal_before_the_first_step_loses_nothing(config):
    """Before the run listens it dies of the signal; before it has its corpora it leaves, with nothing done; then it saves."""
    seen = set()
    for delay in (0.0, 0.02, 0.1, 0.3, 0.6, None):
        name = f"early-{delay}"
        folder = config.parent / "runs" / name
        process = started(config, f"run.name={name}", "evaluate.every_steps=1", "evaluate.tokens=2560")
        if delay is None:
            wait_until(lambda process=process: has_signal_handler(process.pid, signal.SIGTERM), process)
        else:
            time.sleep(delay)
        process.terminate()
        code = wait_for_exit(process)
        seen.add(code)
        assert code in (-signal.SIGTERM, REQUEUE_EXIT_CODE)
        assert last_step(folder) == (open_checkpoint(folder).step if list_committed(folder / "checkpoints") else 0)
    assert REQUEUE_EXIT_CODE in seen


def test_a_damaged_newer_checkpoint_does_not_count_among_the_kept(config, straight):
    """Else keep 1 would keep the damaged one alone, and remove every whole one that the run saves after it."""
    folder = config.parent / "runs" / "damaged"
    overrides = ("run.name=damaged", "checkpoint.every_steps=10", "checkpoint.keep_last=1")
    assert wait_for_exit(started(config, *overrides, "run.stop_step=20")) == 0
    newer = folder / "checkpoints" / "step-00000040"
    shutil.copytree(folder / "checkpoints" / "step-00000020", newer)
    manifest = (newer / MANIFEST_FILE).read_text().replace('"step": 20', '"step": 40')
    (newer / MANIFEST_FILE).write_text(manifest)
    (newer / COMMIT_MARKER).write_text(hashlib.sha256(manifest.encode()).hexdigest())
    next(newer.glob("rank-*.safetensors")).unlink()
    assert wait_for_exit(started(config, *overrides, "run.stop_step=30")) == 0
    assert open_checkpoint(folder).step == 30
    assert wait_for_exit(started(config, *overrides)) == 0
    is_the_straight_run(folder, straight)


def test_a_signal_that_arrives_twice_is_one_and_a_later_one_ends_the_process_at_once():
    process = FORKSERVER.Process(target=listen, args=(GRACE_SECONDS,))
    process.start()
    wait_until(lambda: has_signal_handler(process.pid, signal.SIGTERM), process)
    process.terminate()
    time.sleep(GRACE_SECONDS / 4)
    process.terminate()
    time.sleep(2 * GRACE_SECONDS)
    assert process.is_alive(), "twice at nearly the same moment"
    process.terminate()
    assert wait_for_exit(process) == -signal.SIGTERM


def listen(same_signal_seconds: float) -> None:
    signals.SIGNAL_DEBOUNCE_SECONDS = same_signal_seconds
    signals.StopSignal()
    while True:
        time.sleep(0.01)


def test_a_signal_to_torchrun_saves_the_run_of_its_ranks(config):
    folder = config.parent / "runs" / "launched"
    command = [ROOT / "launch" / "local.sh", "2", config, "run.name=launched", "parallel.tp_size=2"]
    process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: last_step(folder) >= 10, process)
    process.send_signal(signal.SIGUSR1)
    errors = said(process)
    assert process.returncode == REQUEUE_EXIT_CODE, errors
    assert "SIGKILL" not in errors
    stopped = last_step(folder)
    assert 10 <= stopped < 2 * STEPS
    assert open_checkpoint(folder).step == stopped
    ends = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"kind": "end"' in line]
    assert len(ends) == 1
    assert "SIGUSR1" in ends[0] or "another rank" in ends[0]
