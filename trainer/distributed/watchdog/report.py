"""What a rank says of itself when it does not move: its place, its report, its stacks; and how reports are read back.

The one idea: a report counts only if it comes from the very process that holds the rank now, so that what an earlier start
has left in the same folder is never mixed in.
"""

import dataclasses
import json
import linecache
import os
import platform
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tandem.trainer.disk import write_whole


@dataclass(frozen=True)
class Place:
    """The process of a rank: no other process, of this start or an earlier one, has the same."""

    host: str
    """Its name, for people: two may have the same."""
    machine: str
    """Of the booted kernel and of the numbers that it gives to processes here: containers may each have their own."""
    pid: int
    started: int
    """When, in the kernel's ticks since it booted: the numbers of processes are used again."""


def here() -> Place:
    """The place of this process."""
    return Place(platform.node(), machine(), os.getpid(), _stat(os.getpid())[1])


def machine() -> str:
    """Equal where one process can see another by its number; from Linux's /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def state(place: Place) -> str:
    """Whether a process of this host is running, stopped or gone."""
    letter, started = _stat(place.pid)
    if letter in "XxZ" or started != place.started:
        return "gone"
    return "stopped" if letter in "Tt" else "running"


@dataclass(frozen=True)
class Report:
    rank: int
    place: Place
    phase: str
    step: int
    moves: int
    """Phases entered so far; all ranks enter the same ones."""
    seconds: float
    """In this phase; before the end of the first step, since the start."""
    limit_seconds: float
    over: bool
    """The limit has passed; until then the others wait."""
    line: str
    """Where the main thread is."""
    collective: str | None
    """The function of torch.distributed that a thread stands in."""
    group: str | None
    """Name of the group of that collective."""
    numbers: dict[str, int]
    """Collectives begun, by process group."""
    neighbours: dict[str, str]
    """State of the other ranks on this host."""
    lost: str | None = None
    """The message of a connection that broke."""
    crashed: str | None = None
    """The error of this rank's own."""

    @property
    def keys(self) -> list[str]:
        """Of `numbers`, those of the group whose collective the rank stands in: one for each kind of device."""
        return [key for key in self.numbers if self.collective and key.split()[0] == self.group]


Seen = dict[Path, tuple[tuple[int, int], Report | None]]
"""Files that were read, the version of each and what it held."""


def step_folder(hangs: Path, step: int) -> Path:
    return hangs / f"step-{step:08d}"


def file_of(hangs: Path, step: int, rank: int) -> Path:
    return step_folder(hangs, step) / f"rank-{rank:05d}.json"


def write(path: Path, report: Report, stacks: str, flight_record: bytes = b"") -> None:
    """The report lies at `path`, the stacks and torch's record of collectives, if it keeps one, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    write_whole(path.with_suffix(".txt"), stacks)
    if flight_record:
        write_whole(flight_file(path), flight_record)


def flight_file(path: Path) -> Path:
    """Beside the report at `path`, under a name that `torchfrtrace --prefix flight-` takes for the rank's."""
    return path.with_name(f"flight-{int(path.stem.removeprefix('rank-'))}")


def remove(path: Path) -> None:
    """Neither the report nor what belongs to it is at `path`, nor folders that this leaves empty."""
    path.with_suffix(".txt").unlink(missing_ok=True)
    flight_file(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):  # others may still have theirs there
        path.parent.rmdir()
        path.parent.parent.rmdir()


def read(hangs: Path, places: list[Place], seen: Seen) -> dict[int, Report]:
    """The reports of this start, by rank; `seen` keeps what was read before, by file, and is brought up to date."""
    found: dict[int, Report] = {}
    for folder in hangs.glob("step-*"):  # after a rollback ranks may be many steps apart
        with suppress(OSError):
            os.utime(folder)  # else a network file system may list what it remembers
        for path in folder.glob("rank-*.json"):
            with suppress(FileNotFoundError):
                version = (path.stat().st_ino, path.stat().st_mtime_ns)
                if path not in seen or seen[path][0] != version:
                    seen[path] = version, _parsed(path)
                report = seen[path][1]
                if report and report.rank < len(places) and report.place == places[report.rank]:
                    found[report.rank] = report
    return found


def frames() -> dict[int, FrameType]:
    """The innermost frame of every thread, the main thread's first."""
    main = threading.main_thread().ident
    found = sys._current_frames()
    return dict(sorted(found.items(), key=lambda item: item[0] != main))


def standing(frames: dict[int, FrameType]) -> tuple[str | None, str | None]:
    """The collective that a thread stands in, and the name of its group unless that is the default one.

    All threads are looked at: on a GPU, backward runs in a thread of its own.
    """
    for innermost in frames.values():
        calls = [frame for frame, _ in traceback.walk_stack(innermost) if is_collective(frame)]
        if calls:
            return calls[-1].f_code.co_name, getattr(calls[-1].f_locals.get("group"), "group_name", None)
        # The wait for one that was begun before is no function of Python.
        if ".wait(" in linecache.getline(innermost.f_code.co_filename, innermost.f_lineno):
            return "wait", None
    return None, None


def is_collective(frame: FrameType) -> bool:
    """Whether the frame is a function of torch.distributed that talks to other ranks."""
    return frame.f_code.co_filename.endswith(("torch/distributed/distributed_c10d.py", "_functional_collectives.py"))


def line(frame: FrameType, number: int | None = None) -> str:
    """'engine.py:88 in update': where a frame is, or was at line `number`."""
    return f"{Path(frame.f_code.co_filename).name}:{number or frame.f_lineno} in {frame.f_code.co_name}"


def stacks(frames: dict[int, FrameType]) -> str:
    """The Python stacks of all threads, for a person."""
    thread_names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {thread_names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )


def _parsed(path: Path) -> Report | None:
    try:
        fields = json.loads(path.read_bytes())
        return Report(**{**fields, "place": Place(**fields["place"])})
    except (OSError, ValueError, TypeError, KeyError):  # withdrawn at this moment, or written by another version
        return None


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process, from Linux's /proc; 'X' where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[19])
