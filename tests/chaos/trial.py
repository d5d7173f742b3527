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
from tandem.trainer.checkpoint.layout import STATE_KINDS, find_damage, list_committed
from tandem.trainer.checkpoint.read import Checkpoint
from tests.chaos.save_tracer import KILL_ENTRY, Kill, SaveTracer
from tests.promises.conftest import read_step_records
from tests.ranks import FORKSERVER

RANKS = (0, 1)
TRIAL_TIMEOUT_SECONDS = 240.0
"""No start takes so long, and no rank outlives another so long, on the busiest of machines."""
SIGTERM_GRACE_SECONDS = 0.2
"""Between a launcher's SIGTERM and its SIGKILL."""
EXIT_WAIT_SECONDS, GONE_PEER_TIMEOUT_SECONDS = 1.0, 3.0
"""Instead of the trainer's, which a rank that lost the other during a save would wait for."""


@dataclass(frozen=True)
class TrialStart:
    """A command line and its end."""

    config: Path
    overrides: tuple[str, ...]
    kill: Kill | None = None
    kill_after_seconds: float | None = None
    """Kills `victim_ranks` then, from outside."""
    victim_ranks: tuple[int, ...] = RANKS
    has_launcher: bool = True
    """Whether a rank that outlives another is ended, as launchers do; else it has to end by itself."""


@dataclass
class TrialEnd:
    """How the ranks of a start have ended."""

    exit_codes: list[int | None]
    was_killed: bool
    """Whether the start came to its kill."""
    calls: list[tuple[int, int, int, str]]
    """Rank, step, number of the save, name of the call, in the order of the calls."""
    survivor_seconds: float | None = None
    """How long a rank has outlived another until it ended by itself."""

    @property
    def committed_step(self) -> int:
        """The newest step whose marker was in place; -1: none."""
        return max((step for _, step, _, name in self.calls if name.startswith("replace marker")), default=-1)


class Launcher:
    """Starts worlds of ranks, one after the other, each with a new store to meet at."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._numbers = scratch, itertools.count()

    def run(self, start: TrialStart, folder: Path) -> TrialEnd:
        """The start has ended, and none of its processes is left."""
        number = next(self._numbers)
        scratch = self._scratch / f"{number:04d}"
        scratch.mkdir()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        rendezvous_environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(len(RANKS)), "LOCAL_WORLD_SIZE": str(len(RANKS)),
        }  # fmt: skip
        ranks = [
            FORKSERVER.Process(target=_rank_main, args=(rank, rendezvous_environment, scratch, folder, start))
            for rank in RANKS
        ]
        try:
            for process in ranks:
                process.start()
            for rank, process in zip(RANKS, ranks, strict=True):
                (scratch / f"pid-{rank}").write_text(str(process.pid))
            (scratch / "go").touch()
            if start.kill_after_seconds is not None:
                wait([process.sentinel for process in ranks], start.kill_after_seconds)
                for rank in start.victim_ranks:
                    ranks[rank].kill()
            survivor_seconds = _wait_for_ranks(ranks, start)
            assert not any(process.is_alive() for process in ranks), (
                f"still running after {TRIAL_TIMEOUT_SECONDS:g} s: {scratch}"
            )
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        log = scratch / "calls"
        lines = [line.split(" ", 3) for line in log.read_text().splitlines()] if log.exists() else []
        calls = [(int(rank), int(step), int(save), name) for rank, step, save, name in lines]
        codes = [process.exitcode for process in ranks]
        reached_kill = start.kill_after_seconds is not None or any(name == KILL_ENTRY for *_, name in calls)
        victims_killed = [codes[rank] == -signal.SIGKILL for rank in start.victim_ranks]
        # At the end of a run one rank may have left in order when a kill by the clock comes to both.
        may_finish_first = start.kill_after_seconds is not None and all(code in (0, -signal.SIGKILL) for code in codes)
        return TrialEnd(
            codes,
            reached_kill and (all(victims_killed) or (may_finish_first and any(victims_killed))),
            calls,
            survivor_seconds,
        )


def _wait_for_ranks(ranks: list[BaseProcess], start: TrialStart) -> float | None:
    """Waits until both have; how long one of them has outlived the other until it ended by itself."""
    wait([process.sentinel for process in ranks], TRIAL_TIMEOUT_SECONDS)
    first = time.monotonic()
    if len(start.victim_ranks) == 1 and ranks[start.victim_ranks[0]].exitcode == -signal.SIGKILL:
        survivor = ranks[1 - start.victim_ranks[0]]
        if start.has_launcher:
            survivor.terminate()
            survivor.join(SIGTERM_GRACE_SECONDS)
            survivor.kill()
            survivor.join()
            return None
        if survivor.is_alive():
            survivor.join(TRIAL_TIMEOUT_SECONDS)
            return time.monotonic() - first
    for process in ranks:
        process.join(TRIAL_TIMEOUT_SECONDS)
    return None


def _rank_main(
    rank: int, rendezvous_environment: Mapping[str, str], scratch: Path, folder: Path, start: TrialStart
) -> None:
    from jaxtyping import config

    from tandem.trainer.checkpoint import async_save
    from tandem.trainer.distributed import watchdog

    config.update("jaxtyping_disable", True)  # as in a command
    output = os.open(scratch / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(rendezvous_environment, RANK=str(rank), LOCAL_RANK=str(rank))
    while not (scratch / "go").exists():
        time.sleep(0.001)
    async_save.EXIT_WAIT_SECONDS, watchdog.GONE_PEER_TIMEOUT_SECONDS = EXIT_WAIT_SECONDS, GONE_PEER_TIMEOUT_SECONDS
    pid_of: Callable[[int], int] = lambda other: int((scratch / f"pid-{other}").read_text())  # noqa: E731
    SaveTracer(folder, rank, scratch / "calls", start.kill, pid_of).install()
    sys.exit(main(["train", str(start.config), *start.overrides]))


@dataclass
class UndisturbedRun:
    """What the run is that nobody disturbs: digests and records by step."""

    folder: Path
    digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for found in list_committed(self.folder / "checkpoints"):
            assert find_damage(found) is None
            snapshot = Checkpoint(found)
            self.digests[snapshot.step] = snapshot_digest(snapshot)

    @property
    def last_step(self) -> int:
        return max(self.digests)


def snapshot_digest(snapshot: Checkpoint) -> str:
    """Of every bit of the state: true global tensors of all kinds, whoever wrote them, and where the data stands."""
    found = sha256()
    for name in sorted(snapshot.parameter_names):
        for kind in STATE_KINDS:
            found.update(f"{kind} {name}".encode())
            found.update(snapshot.read_tensor(kind, name).numpy())
    facts = {
        name: snapshot.manifest[name] for name in ("step", "tokens", "num_updates", "cursor", "fingerprints", "guard")
    }
    found.update(repr(facts).encode())
    snapshot.close()
    return found.hexdigest()


def checkpoint_faults(folder: Path, undisturbed: UndisturbedRun, min_step: int) -> list[str]:
    """What is wrong with the checkpoints in a run folder; nothing. One of step `min_step` (-1: none) or later has to be
    there.
    """
    found, steps = [], [-1]
    for checkpoint in list_committed(folder / "checkpoints"):
        if wrong := find_damage(checkpoint):
            found.append(f"lost: {checkpoint.name} is committed, and {wrong}")
            continue
        snapshot = Checkpoint(checkpoint)
        steps.append(snapshot.step)
        if snapshot_digest(snapshot) != undisturbed.digests[snapshot.step]:
            found.append(f"wrong: {checkpoint.name} is not the state of the undisturbed run")
    if max(steps) < min_step:
        found.append(f"lost: step {min_step} was committed, and the newest is {max(steps)}")
    return found


def final_faults(folder: Path, undisturbed: UndisturbedRun, last_end: TrialEnd) -> list[str]:
    """What tells a finished run from the undisturbed one; nothing. What kills have torn is removed by the `last_end`
    start's saves, if it made any.
    """
    found, one, other = (
        checkpoint_faults(folder, undisturbed, undisturbed.last_step),
        read_step_records(undisturbed.folder),
        read_step_records(folder),
    )
    if [(step, one[step]["loss"]) for step in sorted(one)] != [(step, other[step]["loss"]) for step in sorted(other)]:
        found.append("wrong: other steps or losses are on record")
    with redirect_stdout(io.StringIO()) as said:
        code = main(["audit", str(folder)])
    if code:
        found.append("wrong: the audit finds the data not proven: " + said.getvalue())
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if last_end.calls and names != [path.name for path in list_committed(folder / "checkpoints")]:
        found.append(f"wrong: something torn is left: {names}")
    return found


def newest_step(folder: Path) -> int:
    """Of the committed checkpoints; -1: none."""
    return max((int(path.name.removeprefix("step-")) for path in list_committed(folder / "checkpoints")), default=-1)


def start_steps(folder: Path) -> list[int]:
    """Where each start of the run in the folder took it up."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.startswith('{"kind": "start"') and line.endswith("}")]
    return [record["step"] for record in records]
