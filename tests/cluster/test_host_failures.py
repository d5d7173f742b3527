"""Hosts and ranks that fail while the shipped scripts run: noticed, named, started again by torchrun, and no bit is lost.

Each story is a run with faults of its own. They wait more than they work, so all are told at once and each test looks at one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from tandem.trainer import train
from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import TrainConfig, parse_dataclass
from tandem.trainer.distributed.watchdog import newest_verdict
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE
from tests import ranks
from tests.cluster import network_hosts
from tests.cluster.network_hosts import LAUNCH_FOLDER, Host
from tests.promises import conftest
from tests.promises.conftest import (
    clean_environment,
    differing_tensors,
    read_step_records,
    run_tandem,
    two_phase_config,
)
from tests.promises.test_mistakes import flip_a_byte

REASON = network_hosts.unsupported_reason()
pytestmark = [
    pytest.mark.dist,
    pytest.mark.chaos,
    pytest.mark.timeout(420),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
corpus = conftest.corpus
STEPS = 60
"""Of each phase: a fault then comes in the middle."""
LIMIT_SECONDS = {"cut_and_frozen": 8}
"""Longest step, where nothing but time tells that ranks hang; else long enough for a machine that is busy."""
PATIENCE_SECONDS = 150
ALONE_STEPS = 5


def tree(corpus: Path, root: Path, name: str) -> dict:
    """An epsilon above the gradients: at another number of ranks rounding is then not made into whole updates."""
    return two_phase_config(
        "btlm", corpus, root, steps=STEPS, run={"name": name}, checkpoint={"every_steps": 10, "keep_last": 2},
        watchdog={"step_timeout_seconds": LIMIT_SECONDS.get(name, 100)}, optim={"eps": 1.0},
    )  # fmt: skip


def undisturbed(straight: dict) -> None:
    assert train.run(parse_dataclass(TrainConfig, straight, "")) == 0


@dataclass
class Story:
    """A run under way, what has happened to it, and when."""

    root: Path
    name: str
    broken_off: Event
    moments: list[tuple[str, float]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.name

    @cached_property
    def config(self) -> Path:
        return self.root / f"{self.name}.yaml"

    @cached_property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    def now(self, what: str) -> None:
        self.moments.append((what, time.monotonic()))

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """It has come about, at about this moment."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            late = time.monotonic() > end or self.broken_off.is_set()
            assert not late, f"no {what} in time\n{self.told()}\n{self.log.read_text()[-6000:]}"
            time.sleep(0.01)
        self.now(what)

    def told(self) -> str:
        seconds = [f"{what} after {then - before:.1f} s" for (_, before), (what, then) in pairwise(self.moments)]
        return f"{self.name}: {', '.join(seconds)}"

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if record["kind"] in kinds]

    def starts(self) -> list[dict[str, Any]]:
        return self.records("start")

    def steps(self, world_size: int = 2) -> int:
        """Made since the last start, if that is one of so many ranks."""
        records = self.records("start", "step")
        last = max((index for index, record in enumerate(records) if record["kind"] == "start"), default=None)
        return len(records) - last - 1 if last is not None and records[last]["world_size"] == world_size else 0

    def ended(self, *processes: subprocess.Popen[bytes]) -> list[int]:
        self.until("end", lambda: None not in [process.poll() for process in processes])
        return [process.wait() for process in processes]


@contextmanager
def local(story: Story) -> Iterator[subprocess.Popen[bytes]]:
    """`launch/local.sh` with two ranks."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with story.log.open("wb") as log:
        process = subprocess.Popen(
            [LAUNCH_FOLDER / "local.sh", "2", story.config],
            env=clean_environment() | {"PATH": path},
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.terminate()  # which torchrun hands to its ranks
            process.wait(60)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [child for child in map(int, found) if network_hosts.is_rank_process(child)]


def is_told_to_stop(process: int) -> bool:
    """Whether a stopped process has a SIGTERM waiting for it."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (waiting,) = (int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return bool(waiting & 1 << signal.SIGTERM - 1)


def rank_killed(story: Story) -> list[int]:
    with local(story) as launcher:
        story.until("step", lambda: story.steps() >= 15)
        killed = children(launcher.pid)[1]
        os.kill(killed, signal.SIGKILL)
        story.until("second start", lambda: len(story.starts()) > 1)
        story.until("step", lambda: story.steps() > 0)
        return story.ended(launcher)


def cut_and_frozen(story: Story) -> list[Any]:
    """The cable is cut and put back; when the run goes on, the rank on the second host is stopped."""
    with network_hosts.connect_hosts("cut") as (head, other), story.log.open("wb") as log:
        launchers = [host.start_launcher(story.config, log) for host in (head, other)]
        story.until("step", lambda: story.steps() >= 15)
        cut_at = time.time()
        other.set_link_state("down")
        story.now("cut")
        story.until("verdict", lambda: newest_verdict(story.folder, cut_at))
        of_cut = newest_verdict(story.folder, cut_at)
        other.set_link_state("up")
        story.until("second start", lambda: len(story.starts()) > 1)
        story.until("step", lambda: story.steps() >= 15)
        frozen, stopped_at = other.rank_process_id(), time.time()
        assert frozen
        os.kill(frozen, signal.SIGSTOP)
        story.now("stop")
        story.until("verdict", lambda: newest_verdict(story.folder, stopped_at))
        of_frozen = newest_verdict(story.folder, stopped_at)
        story.until("end of the frozen rank", lambda: frozen not in other.process_ids())
        story.until("third start", lambda: len(story.starts()) > 2)
        story.until("step", lambda: story.steps() > 0)
        return [of_cut, of_frozen, *story.ended(*launchers)]


def host_lost(story: Story) -> list[Any]:
    """The second host dies, the first goes on without it until it comes back."""
    with network_hosts.connect_hosts("lost") as (head, other), story.log.open("wb") as log:
        fewer = {"NODES": "1:2", "LAST_CALL_SECONDS": "10", "LOST_SECONDS": "30"}

        def begun(host: Host) -> subprocess.Popen[bytes]:
            return host.start_launcher(story.config, log, **fewer)

        first, second = begun(head), begun(other)
        story.until("step of two hosts", lambda: story.steps() >= 15)
        lost_at = time.time()
        other.kill()
        story.now("loss")
        second.wait()
        story.until("verdict", lambda: newest_verdict(story.folder, lost_at))
        story.until("step alone", lambda: story.steps(world_size=1) >= ALONE_STEPS)
        alone = head.rank_process_id()
        assert alone
        os.kill(alone, signal.SIGSTOP)  # else this short run would be over before the other host is back
        story.now("return")
        second = begun(other)
        story.until("word of it", lambda: is_told_to_stop(alone))
        os.kill(alone, signal.SIGCONT)
        story.until("step of two hosts", lambda: story.steps() > 0)
        return [newest_verdict(story.folder, lost_at), *story.ended(first, second)]


def told_to_stop(story: Story) -> list[Any]:
    """By a signal to torchrun on the first host."""
    with network_hosts.connect_hosts("stop") as both, story.log.open("wb") as log:
        launchers = [host.start_launcher(story.config, log) for host in both]
        story.until("step", lambda: story.steps() >= 15)
        launchers[0].send_signal(signal.SIGUSR1)
        return story.ended(*launchers)


def mistaken(story: Story) -> list[Any]:
    """The second host alone reads a damaged shard, some steps on."""
    with network_hosts.connect_hosts("mistake") as both, story.log.open("wb") as log:
        (source,) = parse_dataclass(TrainConfig, yaml.safe_load(story.config.read_text()), "").data.sources.values()
        file = Path(source) / shard_of_last_step(story.root)
        both[1].file_overrides[file] = Path(shutil.copy(file, story.root / "damaged.tar"))
        flip_a_byte(both[1].file_overrides[file])
        return story.ended(*(host.start_launcher(story.config, log) for host in both))


def shard_of_last_step(root: Path) -> str:
    """The one that the undisturbed run reads last."""
    said = run_tandem("audit", root / "runs" / "straight", "--step", 2 * STEPS, "--json").stdout
    shard: str = json.loads(said)[-1]["shards"][-1]
    return shard.partition(":")[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    ranks.run(undisturbed, 2, folder, tree(corpus, folder / "runs", "straight"))
    return folder


TOLD = (rank_killed, cut_and_frozen, host_lost, told_to_stop, mistaken)


@pytest.fixture(scope="module")
def stories(root: Path, corpus: Path) -> Iterator[dict[str, tuple[Story, Future[list[Any]]]]]:
    found, broken_off = {}, Event()
    with ThreadPoolExecutor() as pool:
        for told in TOLD:
            story = Story(root, told.__name__, broken_off)
            story.now("begin")
            story.config.write_text(yaml.safe_dump(tree(corpus, root / "runs", story.name)))
            found[story.name] = story, pool.submit(told, story)
        yield found
        broken_off.set()


def is_the_straight_run(story: Story, root: Path) -> None:
    """To the last bit of losses, weights and moments."""
    one, other = read_step_records(root / "runs" / "straight"), read_step_records(story.folder)
    assert sorted(other) == list(range(1, 2 * STEPS + 1))
    assert [other[step]["loss"] for step in sorted(other)] == [one[step]["loss"] for step in sorted(one)]
    assert differing_tensors(open_checkpoint(root / "runs" / "straight"), open_checkpoint(story.folder)) == []
    assert main(["audit", str(story.folder)]) == 0


def test_torchrun_starts_the_ranks_of_a_machine_again_after_one_was_killed(stories, root):
    story, future = stories["rank_killed"]
    assert future.result() == [0]
    print(story.told())
    assert len(story.starts()) >= 2
    is_the_straight_run(story, root)


def test_a_cut_cable_and_a_frozen_rank_are_named_and_cost_no_bit(stories, root):
    story, future = stories["cut_and_frozen"]
    of_cut, of_frozen, *codes = future.result()
    print(story.told())
    assert codes == [0, 0]
    assert "the network between hosts host-a, host-b" in of_cut
    assert "rank 1 on host-b is silent" in of_frozen
    assert len(story.starts()) >= 3
    is_the_straight_run(story, root)


def test_a_lost_host_is_gone_on_without_and_taken_back(stories, root):
    story, future = stories["host_lost"]
    verdict, *codes = future.result()
    print(story.told())
    assert codes == [0, 0]
    assert "rank 1 on host-b" in verdict
    assert [start["world_size"] for start in story.starts()][-3:] == [2, 1, 2]
    assert main(["audit", str(story.folder)]) == 0
    straight = root / "runs" / "straight"
    assert fed(story.folder) == fed(straight)
    one, other = read_step_records(straight), read_step_records(story.folder)
    assert sorted(other) == list(range(1, 2 * STEPS + 1))
    assert [other[step]["loss"] for step in other] == pytest.approx([one[step]["loss"] for step in other], rel=1e-5)


def test_a_signal_to_torchrun_on_the_first_host_saves_and_ends_the_run_on_all(stories):
    story, future = stories["told_to_stop"]
    assert future.result() == [REQUEUE_EXIT_CODE, 1]
    print(story.told())
    assert "Traceback" not in story.log.read_text()
    assert len(story.starts()) == len(story.records("end")) == 1
    assert open_checkpoint(story.folder).step == max(read_step_records(story.folder)) < 2 * STEPS


def test_a_mistake_that_one_rank_finds_is_one_line_and_ends_the_run_on_all_machines(stories, root):
    story, future = stories["mistaken"]
    assert future.result() == [2, 2]
    print(story.told())
    (line,) = {line for line in story.log.read_text().splitlines() if line.startswith("tandem: ")}
    assert shard_of_last_step(root) in line
    assert len(story.starts()) == 1, "nothing that a restart mends"
    assert newest_verdict(story.folder, 0.0) is None, "and no hang"


def fed(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step in a run's ledger."""
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == "step"}
