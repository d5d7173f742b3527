"""One start of a run on two ranks, as torchrun makes it, and its end by a kill; and what is then true of its folder.

The store is the launcher's, in this process: a rank that dies takes nothing with it that the other needs to notice.
"""

import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.layout import KINDS, committed, damage
from tandem.trainer.checkpoint.read import Snapshot
from tests.chaos.save_tracer import KILLED, Kill, Tap
from tests.promises.conftest import steps_of
from tests.ranks import SERVER

RANKS = (0, 1)
END_SECONDS = 240.0
"""No start takes so long, and no rank outlives another so long, on the busiest of machines."""
GRACE_SECONDS = 0.2
"""Between a launcher's SIGTERM and its SIGKILL."""
GOODBYE_SECONDS, GONE_SECONDS = 1.0, 3.0
"""Instead of the trainer's, which a rank that lost the other during a save would wait for."""


@dataclass(frozen=True)
class Start:
    """A command line and its end."""

    config: Path
    overrides: tuple[str, ...]
    kill: Kill | None = None
    after_seconds: float | None = None
    """Kills `victims` then, from outside."""
    victims: tuple[int, ...] = RANKS
    launcher: bool = True
    """Whether a rank that outlives another is ended, as launchers do; else it has to end by itself."""


@dataclass
class End:
    """How the ranks of a start have ended."""

    codes: list[int | None]
    killed: bool
    """Whether the start came to its kill."""
    log: list[tuple[int, int, int, str]]
    """Rank, step, number of the save, name of the call, in the order of the calls."""
    alone_seconds: float | None = None
    """How long a rank has outlived another until it ended by itself."""

    @property
    def committed(self) -> int:
        """The newest step whose marker was in place; -1: none."""
        return max((step for _, step, _, name in self.log if name.startswith("replace marker")), default=-1)


class Launcher:
    """Starts worlds of ranks, one after the other, each with a new store to meet at."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._numbers = scratch, itertools.count()

    def run(self, start: Start, folder: Path) -> End:
        """The start has ended, and none of its processes is left."""
        number = next(self._numbers)
        scratch = self._scratch / f"{number:04d}"
        scratch.mkdir()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meet = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(len(RANKS)), "LOCAL_WORLD_SIZE": str(len(RANKS)),
        }  # fmt: skip
        ranks = [SERVER.Process(target=_rank, args=(rank, meet, scratch, folder, start)) for rank in RANKS]
        try:
            for process in ranks:
                process.start()
            for rank, process in zip(RANKS, ranks, strict=True):
                (scratch / f"pid-{rank}").write_text(str(process.pid))
            (scratch / "go").touch()
            if start.after_seconds is not None:
                wait([process.sentinel for process in ranks], start.after_seconds)
                for rank in start.victims:
                    ranks[rank].kill()
            alone = _ended(ranks, start)
            assert not any(process.is_alive() for process in ranks), f"still running after {END_SECONDS:g} s: {scratch}"
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        log = scratch / "calls"
        lines = [line.split(" ", 3) for line in log.read_text().splitlines()] if log.exists() else []
        calls = [(int(rank), int(step), int(save), name) for rank, step, save, name in lines]
        codes = [process.exitcode for process in ranks]
        came = start.after_seconds is not None or any(name == KILLED for *_, name in calls)
        hit = [codes[rank] == -signal.SIGKILL for rank in start.victims]
        # At the end of a run one rank may have left in order when a kill by the clock comes to both.
        late = start.after_seconds is not None and all(code in (0, -signal.SIGKILL) for code in codes)
        return End(codes, came and (all(hit) or (late and any(hit))), calls, alone)


def _ended(ranks: list[BaseProcess], start: Start) -> float | None:
    """Waits until both have; how long one of them has outlived the other until it ended by itself."""
    wait([process.sentinel for process in ranks], END_SECONDS)
    first = time.monotonic()
    if len(start.victims) == 1 and ranks[start.victims[0]].exitcode == -signal.SIGKILL:
        left = ranks[1 - start.victims[0]]
        if start.launcher:
            left.terminate()
            left.join(GRACE_SECONDS)
            left.kill()
            left.join()
            return None
        if left.is_alive():
            left.join(END_SECONDS)
            return time.monotonic() - first
    for process in ranks:
        process.join(END_SECONDS)
    return None


def _rank(rank: int, meet: Mapping[str, str], scratch: Path, folder: Path, start: Start) -> None:
    from jaxtyping import config

    from tandem.trainer.checkpoint import async_save
    from tandem.trainer.distributed import watchdog

    config.update("jaxtyping_disable", True)  # as in a command
    output = os.open(scratch / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(meet, RANK=str(rank), LOCAL_RANK=str(rank))
    while not (scratch / "go").exists():
        time.sleep(0.001)
    async_save.LONGEST_GOODBYE_SECONDS, watchdog.GONE_SECONDS = GOODBYE_SECONDS, GONE_SECONDS
    pid_of: Callable[[int], int] = lambda other: int((scratch / f"pid-{other}").read_text())  # noqa: E731
    Tap(folder, rank, scratch / "calls", start.kill, pid_of).install()
    sys.exit(main(["train", str(start.config), *start.overrides]))


@dataclass
class Truth:
    """What the run is that nobody disturbs: digests and records by step."""

    folder: Path
    digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for found in committed(self.folder / "checkpoints"):
            assert damage(found) is None
            snapshot = Snapshot(found)
            self.digests[snapshot.step] = digest(snapshot)

    @property
    def last_step(self) -> int:
        return max(self.digests)


def digest(snapshot: Snapshot) -> str:
    """Of every bit of the state: true global tensors of all kinds, whoever wrote them, and where the data stands."""
    found = sha256()
    for name in sorted(snapshot.names):
        for kind in KINDS:
            found.update(f"{kind} {name}".encode())
            found.update(snapshot.tensor(kind, name).numpy())
    facts = {name: snapshot.manifest[name] for name in ("step", "tokens", "updates", "cursor", "fingerprints", "guard")}
    found.update(repr(facts).encode())
    snapshot.close()
    return found.hexdigest()


def faults(folder: Path, truth: Truth, least: int) -> list[str]:
    """What is wrong with the checkpoints in a run folder; nothing. One of step `least` (-1: none) or later has to be there."""
    found, steps = [], [-1]
    for checkpoint in committed(folder / "checkpoints"):
        if wrong := damage(checkpoint):
            found.append(f"lost: {checkpoint.name} is committed, and {wrong}")
            continue
        snapshot = Snapshot(checkpoint)
        steps.append(snapshot.step)
        if digest(snapshot) != truth.digests[snapshot.step]:
            found.append(f"wrong: {checkpoint.name} is not the state of the undisturbed run")
    if max(steps) < least:
        found.append(f"lost: step {least} was committed, and the newest is {max(steps)}")
    return found


def faults_at_the_end(folder: Path, truth: Truth, last: End) -> list[str]:
    """What tells a finished run from the undisturbed one; nothing. What kills have torn is removed by the `last` start's saves,
    if it made any.
    """
    found, one, other = faults(folder, truth, truth.last_step), steps_of(truth.folder), steps_of(folder)
    if [(step, one[step]["loss"]) for step in sorted(one)] != [(step, other[step]["loss"]) for step in sorted(other)]:
        found.append("wrong: other steps or losses are on record")
    with redirect_stdout(io.StringIO()) as said:
        code = main(["audit", str(folder)])
    if code:
        found.append("wrong: the audit finds the data not proven: " + said.getvalue())
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if last.log and names != [path.name for path in committed(folder / "checkpoints")]:
        found.append(f"wrong: something torn is left: {names}")
    return found


def newest_step(folder: Path) -> int:
    """Of the committed checkpoints; -1: none."""
    return max((int(path.name.removeprefix("step-")) for path in committed(folder / "checkpoints")), default=-1)


def resumed_steps(folder: Path) -> list[int]:
    """Where each start of the run in the folder took it up."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.startswith('{"kind": "start"') and line.endswith("}")]
    return [record["step"] for record in records]
