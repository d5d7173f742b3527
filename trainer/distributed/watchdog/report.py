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

from tandem.trainer.disk import atomic_write


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank: no other process, of this start or an earlier one, has the same."""

    host: str
    """Its name, for people: two may have the same."""
    machine_id: str
    """Of the booted kernel and of the numbers that it gives to processes here: containers may each have their own."""
    pid: int
    start_ticks: int
    """When, in the kernel's ticks since it booted: the numbers of processes are used again."""


def current_process() -> RankProcess:
    """This process: host, machine, number and start."""
    return RankProcess(platform.node(), current_machine_id(), os.getpid(), _process_stat(os.getpid())[1])


def current_machine_id() -> str:
    """Equal where one process can see another by its number; from Linux's /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def process_state(process: RankProcess) -> str:
    """Whether a process of this host is running, stopped or gone."""
    state_letter, start_ticks = _process_stat(process.pid)
    if state_letter in "XxZ" or start_ticks != process.start_ticks:
        return "gone"
    return "stopped" if state_letter in "Tt" else "running"


@dataclass(frozen=True)
class HangReport:
    rank: int
    process: RankProcess
    phase: str
    step: int
    num_phases: int
    """Phases entered so far; all ranks enter the same ones."""
    waited_seconds: float
    """In this phase; before the end of the first step, since the start."""
    timeout_seconds: float
    timed_out: bool
    """The limit has passed; until then the others wait."""
    location: str
    """Where the main thread is."""
    collective: str | None
    """The function of torch.distributed that a thread stands in."""
    group_name: str | None
    """Name of the group of that collective."""
    num_collectives: dict[str, int]
    """Collectives begun, by process group."""
    local_peer_states: dict[str, str]
    """State of the other ranks on this host."""
    connection_error: str | None = None
    """The message of a connection that broke."""
    crash_error: str | None = None
    """The error of this rank's own."""

    @property
    def group_keys(self) -> list[str]:
        """Of `num_collectives`, those of the group whose collective the rank stands in: one for each kind of device."""
        return [key for key in self.num_collectives if self.collective and key.split()[0] == self.group_name]


ReportCache = dict[Path, tuple[tuple[int, int], HangReport | None]]
"""Files that were read, the version of each and what it held."""


def step_folder(hangs_folder: Path, step: int) -> Path:
    return hangs_folder / f"step-{step:08d}"


def report_path(hangs_folder: Path, step: int, rank: int) -> Path:
    return step_folder(hangs_folder, step) / f"rank-{rank:05d}.json"


def write_report(path: Path, report: HangReport, stacks: str, flight_record: bytes = b"") -> None:
    """The report lies at `path`, the stacks and torch's record of collectives, if it keeps one, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    atomic_write(path.with_suffix(".txt"), stacks)
    if flight_record:
        atomic_write(flight_record_path(path), flight_record)


def flight_record_path(path: Path) -> Path:
    """Beside the report at `path`, under a name that `torchfrtrace --prefix flight-` takes for the rank's."""
    return path.with_name(f"flight-{int(path.stem.removeprefix('rank-'))}")


def remove_report(path: Path) -> None:
    """Neither the report nor what belongs to it is at `path`, nor folders that this leaves empty."""
    path.with_suffix(".txt").unlink(missing_ok=True)
    flight_record_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):  # others may still have theirs there
        path.parent.rmdir()
        path.parent.parent.rmdir()


def read_reports(hangs_folder: Path, processes: list[RankProcess], cache: ReportCache) -> dict[int, HangReport]:
    """The reports of this start, by rank; `cache` keeps what was read before, by file, and is brought up to date."""
    reports: dict[int, HangReport] = {}
    for folder in hangs_folder.glob("step-*"):  # after a rollback ranks may be many steps apart
        with suppress(OSError):
            os.utime(folder)  # else a network file system may list what it remembers
        for path in folder.glob("rank-*.json"):
            with suppress(FileNotFoundError):
                version = (path.stat().st_ino, path.stat().st_mtime_ns)
                if path not in cache or cache[path][0] != version:
                    cache[path] = version, _parse_report(path)
                report = cache[path][1]
                if report and report.rank < len(processes) and report.process == processes[report.rank]:
                    reports[report.rank] = report
    return reports


def thread_frames() -> dict[int, FrameType]:
    """The innermost frame of every thread, the main thread's first."""
    main = threading.main_thread().ident
    frames_by_thread = sys._current_frames()
    return dict(sorted(frames_by_thread.items(), key=lambda item: item[0] != main))


def find_collective(frames: dict[int, FrameType]) -> tuple[str | None, str | None]:
    """The collective that a thread stands in, and the name of its group unless that is the default one.

    All threads are looked at: on a GPU, backward runs in a thread of its own.
    """
    for innermost in frames.values():
        calls = [frame for frame, _ in traceback.walk_stack(innermost) if is_collective_frame(frame)]
        if calls:
            return calls[-1].f_code.co_name, getattr(calls[-1].f_locals.get("group"), "group_name", None)
        # The wait for one that was begun before is no function of Python.
        if ".wait(" in linecache.getline(innermost.f_code.co_filename, innermost.f_lineno):
            return "wait", None
    return None, None


def is_collective_frame(frame: FrameType) -> bool:
    """Whether the frame is a function of torch.distributed that talks to other ranks."""
    return frame.f_code.co_filename.endswith(("torch/distributed/distributed_c10d.py", "_functional_collectives.py"))


def format_location(frame: FrameType, line_number: int | None = None) -> str:
    """'engine.py:88 in update': where a frame is, or was at line `line_number`."""
    return f"{Path(frame.f_code.co_filename).name}:{line_number or frame.f_lineno} in {frame.f_code.co_name}"


def format_stacks(frames: dict[int, FrameType]) -> str:
    """The Python stacks of all threads, for a person."""
    thread_names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {thread_names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )


def _parse_report(path: Path) -> HangReport | None:
    try:
        fields = json.loads(path.read_bytes())
        return HangReport(**{**fields, "process": RankProcess(**fields["process"])})
    except (OSError, ValueError, TypeError, KeyError):  # withdrawn at this moment, or written by another version
        return None


def _process_stat(pid: int) -> tuple[str, int]:
    """State and start of a process, from Linux's /proc; 'X' where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[19])
