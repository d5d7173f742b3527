"""A signal in every window of a run: all ranks leave with 85, in time, at the last step made, and the run loses no bit.

The one idea: a rank writes down each phase of its work as it tells the watchdog of it, so that a signal is sent when the run is
seen to be in the window. A run meets one signal in each window, start after start. SIGNAL_ROUNDS in the environment says how
many runs do so.
"""

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.trainer import startup
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.layout import list_committed
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import load_config
from tandem.trainer.data import loader
from tandem.trainer.data.loader import Loader
from tandem.trainer.distributed.watchdog import Watchdog
from tandem.trainer.runtime import signals
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests.ports import free_ports
from tests.promises import test_guard
from tests.promises.conftest import (
    differing_tensors,
    has_signal_handler,
    read_step_records,
    start_command,
    two_phase_config,
    wait_for_exit,
)
from tests.ranks import FORKSERVER
from tests.timeouts import TEST_TIMEOUT_SECONDS
from tests.trainer.data.faulty_server import FaultyServer

pytestmark = [pytest.mark.dist, pytest.mark.slow]
ROUNDS = int(os.environ.get("SIGNAL_ROUNDS", "1"))
STEPS = 40 if ROUNDS == 1 else 75
"""Of each phase: enough for some in each start that a signal ends."""
LIMIT_SECONDS = 25.0
"""A scheduler's grace is 30 seconds or more."""
KINDS = ("start", "step", "rollback")
"""Of the records that say where a run stands."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AT_ONCE_SECONDS = 5.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Window:
    phases: tuple[str, ...] = ()
    """Rank 0's work is in one of these, as it tells the watchdog; empty: in any."""
    overrides: tuple[str, ...] = ()
    fsync_seconds: float = 0.0
    """What a disk takes for each."""
    opening_seconds: float = 0.0
    """What it takes to open each corpus, or the newest checkpoint: here a moment, too short to be seen in every start."""
    ahead_seconds: float = 0.0
    """What it takes to read each batch ahead, from number `ahead_from` on."""
    ahead_from: int = 1
    silent: str = ""
    """The corpus lies on a server that does not answer for these files."""
    steps: int = 0
    """To be made first by this start."""
    step_seconds: float = 0.06
    """Sleep in each step, so that a signal finds a run of this small model in the middle."""


STEP = ("data", "forward and backward", "update")
EVALUATING = ("evaluate.every_steps=1", "evaluate.tokens=12800")
SAVING = {"overrides": ("checkpoint.every_steps=1",), "fsync_seconds": 0.15}
WINDOWS = {
    "start: corpora": Window(("corpora",), opening_seconds=0.3),
    "start: model": Window(("model",)),
    "start: checkpoint": Window(("checkpoint",), opening_seconds=0.3),
    "first step": Window(STEP),
    "forward and backward": Window(("forward and backward",), steps=2),
    "update": Window(("update",), steps=1),
    "wait for data": Window(("data",), silent="train-*.tar"),
    "evaluation": Window(("evaluation",), EVALUATING),
    "evaluation beside a slow store": Window(("evaluation",), EVALUATING, ahead_seconds=120, steps=1),
    "evaluation, wait for data": Window(("data",), EVALUATING, silent="validation-*.tar"),
    "start: wait for a manifest": Window(("corpora",), silent="manifest.json"),
    "start: wait for the tokenizer": Window(("tokenizer",), silent="tokenizer.json"),
    "beside a save": Window(STEP, steps=1, **SAVING),
    "wait for a save": Window(("save",), **SAVING),
    "anywhere": Window(steps=1),
}
ROLLING_BACK = Window(("rollback",), fsync_seconds=0.3, ahead_seconds=120)
FEW = (
    "start: model",
    "start: wait for the tokenizer",
    "forward and backward",
    "wait for data",
    "evaluation beside a slow store",
)
"""What two ranks meet in a single round: each start of two takes seconds."""


@dataclass(frozen=True)
class Rank:
    process: BaseProcess
    phases: Path
    """The file in which the rank writes the phase that it enters, and how many that makes."""

    def phase(self) -> tuple[str, str]:
        """The phase it is in, and the number of that; empty before the first."""
        name, _, number = self.phases.read_text().strip().rpartition(" ")
        return name, number


@dataclass
class Tally:
    """Of all signals that this module has sent to runs."""

    seconds: list[float] = field(default_factory=list)
    """Each until all ranks had left."""
    windows: list[str] = field(default_factory=list)

    def add(self, window: str, seconds: float) -> None:
        self.windows.append(window)
        self.seconds.append(seconds)

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.windows.count(name)} {name}" for name in dict.fromkeys(self.windows))
        slowest = self.windows[self.seconds.index(max(self.seconds))]
        return f"signals sent {len(self.seconds)}, missed 0, slowest {max(self.seconds):.1f} s ({slowest}); {kinds}"


@pytest.fixture(scope="module")
def tally(request) -> Iterator[Tally]:
    found = Tally()
    yield found
    if found.seconds:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{found}")


@pytest.fixture(scope="module")
def server(corpus) -> Iterator[FaultyServer]:
    """The corpus over http."""
    with FaultyServer(corpus) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.test_over.set()
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "tp 2"])
def config(request, tmp_path_factory, corpus) -> Path:
    root = tmp_path_factory.mktemp(f"windows-{request.param}")
    sections = {"parallel": {"tp_size": request.param}, "checkpoint": {"every_steps": 0, "keep_last": 2}}
    tree = two_phase_config("stablelm", corpus, root / "runs", steps=STEPS, **sections)
    for phase in tree["schedule"]["phases"]:
        phase["micro_batch_size"] = phase["global_batch_size"]
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


@pytest.fixture(scope="module")
def straight(config) -> Path:
    """The run that no signal met."""
    assert finished(config)
    return config.parent / "runs" / "tiny"


@contextmanager
def started(config: Path, *overrides: str, window: Window = Window(), size: int | None = None) -> Iterator[list[Rank]]:
    """Forks of the ranks' server, one for each rank of the config or the first `size`, as srun starts them where there are
    several; they are gone when the block ends.
    """
    num_ranks, [port] = load_config(config, []).parallel.tp_size, free_ports(1)
    ranks = []
    for rank in range(size or num_ranks):
        place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if num_ranks > 1 else {}  # fmt: skip
        phases = config.parent / f"phases-{time.monotonic_ns()}-{rank}.txt"
        phases.touch()
        command = ["train", str(config), *overrides]
        environment = {name: str(value) for name, value in place.items()} | {"NO_PROXY": "127.0.0.1"}
        process = FORKSERVER.Process(target=rank_main, args=(command, environment, phases, window))
        process.start()
        ranks.append(Rank(process, phases))
    try:
        yield ranks
    finally:
        for each in ranks:
            each.process.kill()
            each.process.join()


def rank_main(command: list[str], environment: dict[str, str], phases: Path, window: Window) -> None:
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    os.environ.update(environment)
    fsync, source, batch, reads = os.fsync, Loader._build_reader, loader.build_batch, itertools.count()
    newest, enter = startup.open_newest, Watchdog.enter_phase
    entered, file = itertools.count(1), os.open(phases, os.O_WRONLY)
    os.fsync = lambda descriptor: (time.sleep(window.fsync_seconds), fsync(descriptor))[1]
    Loader._build_reader = lambda *corpus: (time.sleep(window.opening_seconds), source(*corpus))[1]
    startup.open_newest = lambda *place: (time.sleep(window.opening_seconds), newest(*place))[1]

    def read(*cut: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and next(reads) >= window.ahead_from:
            time.sleep(window.ahead_seconds)
        return batch(*cut)

    def at(watchdog: Watchdog, phase: str, step: int | None = None) -> None:
        enter(watchdog, phase, step)
        os.pwrite(file, f"{phase} {next(entered)}".ljust(80).encode(), 0)
        time.sleep(window.step_seconds if phase == "forward and backward" else 0)

    loader.build_batch, Watchdog.enter_phase = read, at
    sys.exit(main(command))


def codes(ranks: list[Rank]) -> set[int | None]:
    return {wait_for_exit(rank.process) for rank in ranks}


def finished(config: Path, *overrides: str) -> bool:
    """Whether a start that no signal meets comes to the end of the run."""
    with started(config, *overrides, window=Window(step_seconds=0.0)) as ranks:
        return codes(ranks) == {0}


def wait_until(condition: Callable[[], bool], ranks: list[Rank]) -> None:
    deadline = time.monotonic() + TEST_TIMEOUT_SECONDS
    while not condition():
        left = [rank.process.exitcode for rank in ranks]
        assert left.count(None) == len(ranks), f"ended before the signal, exit codes {left}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def is_in(window: Window, rank: Rank, server: FaultyServer | None) -> bool:
    """Where the server is silent: it was asked, and the rank has been there for half a second."""
    before = rank.phase()
    if window.phases and before[0] not in window.phases:
        return False
    if not window.silent or server is None:
        return True
    time.sleep(0.5)
    return rank.phase() == before and any(fnmatch(path, f"/{window.silent}") for path, _ in server.requests)


def records(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def standing(folder: Path) -> int:
    """The step that the run has come to, by its records."""
    return next((each["step"] for each in reversed(records(folder)) if each["kind"] in KINDS), 0)


def signalled(ranks: list[Rank], targets: list[int], number: signal.Signals, folder: Path) -> float:
    """Seconds until all ranks have left as they should, after the targets were told to."""
    began = time.monotonic()
    for target in targets:
        os.kill(ranks[target].process.pid, number)
    assert codes(ranks) == {REQUEUE_EXIT_CODE}
    seconds = time.monotonic() - began
    assert seconds < LIMIT_SECONDS
    assert standing(folder) == saved_step(folder)
    return seconds


def saved_step(folder: Path) -> int:
    """Of the newest committed checkpoint; 0 where a run that has made nothing has saved none."""
    return open_checkpoint(folder).step if list_committed(folder / "checkpoints") else 0


def is_the_straight_run(folder: Path, straight: Path) -> None:
    one, other = read_step_records(straight), read_step_records(folder)
    assert [other[step]["loss"] for step in sorted(other)] == [one[step]["loss"] for step in sorted(one)]
    assert open_checkpoint(folder).manifest["cursor"] == open_checkpoint(straight).manifest["cursor"]
    assert main(["audit", str(folder)]) == 0
    assert differing_tensors(open_checkpoint(straight), open_checkpoint(folder)) == []


@contextmanager
def silence(server: FaultyServer, config: Path, files: str) -> Iterator[tuple[str, ...]]:
    """Overrides of a run that reads over http and has no copies yet, of files that the server does not answer for."""
    for file in [path.name for path in server.folder.glob(files)] or [files]:
        server.faults[f"/{file}"].append("silence always")
    server.requests.clear()
    try:
        copies = config.parent / f"copies-{time.monotonic_ns()}"
        yield f"data.sources.corpus={server.address}", f"data.cache.folder={copies}"
    finally:
        server.faults.clear()


def meet(
    name: str, window: Window, config: Path, folder: Path, *, server: FaultyServer | None = None, draw: random.Random
) -> float:
    """A start of the run has met a signal in the window, on one rank or on all; seconds until all had left."""
    before = standing(folder)
    with (
        silence(server, config, window.silent) if window.silent else nullcontext(()) as more,
        started(
            config,
            f"run.name={folder.name}",
            *window.overrides,
            *more,
            window=window,
        ) as ranks,
    ):
        all_ranks = list(range(len(ranks)))
        one = [draw.choice(all_ranks)]
        # Of ranks that wait for a store the last one alone, which may stand in a collective: the others have to hear of it.
        targets = all_ranks[-1:] if window.silent else draw.choice([one, one, all_ranks])
        wait_until(lambda: standing(folder) >= before + window.steps, ranks)
        time.sleep(draw.uniform(0, 0.3) if name == "anywhere" else 0)
        wait_until(lambda: is_in(window, ranks[0], server), ranks)
        return signalled(ranks, targets, draw.choice(SIGNALS), folder)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_signal_in_any_window_is_heeded_by_all_ranks_and_loses_no_bit(number, config, straight, server, tally):
    draw = random.Random(number)
    folder = config.parent / "runs" / f"round-{number}"
    names = list(WINDOWS if ROUNDS > 1 else FEW)
    draw.shuffle(names)
    for name in names:
        tally.add(name, meet(name, WINDOWS[name], config, folder, server=server, draw=draw))
    assert finished(config, f"run.name={folder.name}")
    is_the_straight_run(folder, straight)


def test_a_signal_while_the_run_goes_back_loses_no_bit(tmp_path_factory, corpus, tally):
    root = tmp_path_factory.mktemp("rolling-back")
    bad = test_guard.rare(root, corpus)
    test_guard.write_weights(root, corpus, bad)
    config = test_guard.config(
        root, corpus, bad.seed, "straight", run={"stop_step": test_guard.STEPS}, **test_guard.BACK
    )
    assert finished(config)
    folder = root / "runs" / "met"
    window = replace(ROLLING_BACK, ahead_from=bad.step)
    tally.add("rolling back", meet("rolling back", window, config, folder, draw=random.Random(0)))
    assert [each["kind"] for each in records(folder)][-2:] == ["rollback", "end"], (
        "it had gone back, and made no step since"
    )
    assert finished(config, "run.name=met")
    is_the_straight_run(folder, root / "runs" / "straight")


@pytest.mark.parametrize("config", [2], indirect=True, ids=["tp 2"])
def test_a_signal_to_all_processes_of_torchrun_loses_no_bit(config, straight, tally):
    """As a scheduler sends it: to the launcher, which passes it on, and to the ranks, which hear it twice."""
    folder = config.parent / "runs" / "launched"
    long_steps = ("evaluate.every_steps=1", "evaluate.tokens=2560")
    with start_command([ROOT / "launch" / "local.sh", 2, config, "run.name=launched", *long_steps]) as process:
        deadline = time.monotonic() + TEST_TIMEOUT_SECONDS
        while standing(folder) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=TEST_TIMEOUT_SECONDS)[0]
        tally.add("torchrun", time.monotonic() - began)
    assert process.returncode == REQUEUE_EXIT_CODE, output
    assert tally.seconds[-1] < LIMIT_SECONDS, output
    assert 2 <= standing(folder) == saved_step(folder), output
    assert finished(config, "run.name=launched")
    is_the_straight_run(folder, straight)


@pytest.mark.parametrize("config", [2], indirect=True, ids=["tp 2"])
def test_a_second_signal_ends_a_rank_that_waits_for_a_frozen_one(config):
    folder = config.parent / "runs" / "frozen"
    with started(config, "run.name=frozen") as ranks:
        waiting, frozen = (rank.process.pid for rank in ranks)
        wait_until(lambda: standing(folder) >= 1, ranks)
        os.kill(frozen, signal.SIGSTOP)
        wait_until(lambda: still(folder), ranks)
        os.kill(waiting, signal.SIGTERM)
        time.sleep(signals.SIGNAL_DEBOUNCE_SECONDS + 0.5)
        assert still(folder), "it waits for the other, that both may leave at one step"
        began = time.monotonic()
        os.kill(waiting, signal.SIGTERM)
        assert wait_for_exit(ranks[0].process) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert time.monotonic() - began < AT_ONCE_SECONDS


def still(folder: Path) -> bool:
    """Whether no step, of which many are made in a second, was made in the last one."""
    before = (folder / "metrics.jsonl").stat().st_size
    time.sleep(1)
    return (folder / "metrics.jsonl").stat().st_size == before


@pytest.mark.parametrize("config", [1], indirect=True, ids=["one rank"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_heeds_a_signal_from_before_its_imports_on(number, config, tally, capsys):
    """Before that it dies of the signal, and has done nothing."""
    folder = config.parent / "runs" / f"early-{number.name}"
    with start_command([sys.executable, "-m", "tandem.trainer", "train", config, f"run.name={folder.name}"]) as process:
        process.send_signal(number)
        assert process.wait(30) == -number
    assert not folder.exists()
    began = time.monotonic()
    with start_command([sys.executable, "-m", "tandem.trainer", "train", config, f"run.name={folder.name}"]) as process:
        while not has_signal_handler(process.pid, number):
            assert process.poll() is None
            time.sleep(0.001)
        heard = time.monotonic()
        process.send_signal(number)
        output = process.communicate(timeout=TEST_TIMEOUT_SECONDS)[0]
    tally.add("start: imports", time.monotonic() - heard)
    with capsys.disabled():
        print(
            f"\na process listens after {heard - began:.2f} s; one signalled then has left after {tally.seconds[-1]:.1f} s"
        )
    assert process.returncode == REQUEUE_EXIT_CODE, output
    assert standing(folder) == saved_step(folder) == 0


@pytest.mark.parametrize("config", [2], indirect=True, ids=["tp 2"])
def test_a_signal_to_a_rank_whose_peers_do_not_come_ends_it_and_is_no_failure(config):
    """As when a scheduler takes a job away that still waits for some machine, again and again."""
    folder = config.parent / "runs" / "alone"
    with started(config, "run.name=alone", "run.max_repeat_failures=1", size=1) as [rank]:
        wait_until(lambda: has_signal_handler(rank.process.pid, signal.SIGTERM), [rank])
        time.sleep(2)  # it then waits in C++, where it tells no phase; before that it is to leave as well
        began = time.monotonic()
        os.kill(rank.process.pid, signal.SIGTERM)
        assert wait_for_exit(rank.process) == REQUEUE_EXIT_CODE
        assert time.monotonic() - began < LIMIT_SECONDS
    assert not folder.exists()
    assert finished(config, "run.name=alone", "run.max_repeat_failures=1", "run.stop_step=1")
