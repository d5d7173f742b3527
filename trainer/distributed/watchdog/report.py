"""The report that a rank writes when it hangs: collect position and stacks, write the report, and read all ranks' reports.

A report counts only if the process that wrote it is the one that now has the rank. This excludes reports that an earlier start
left in the same folder.
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

from tandem.trainer.config import parse_content
from tandem.trainer.config.outside import read_json
from tandem.trainer.disk import atomic_write


@dataclass(frozen=True)
class RankProcess:
    """Identifies the process of a rank, uniquely across all starts of a run."""

    host: str
    """Host name, for messages. Two hosts may have the same name."""
    machine_id: str
    """Identifies the booted kernel and the PID namespace. It may differ between containers on one machine."""
    pid: int
    start_ticks: int
    """Start time in kernel ticks since boot. It distinguishes processes with the same, reused ID."""


def current_process() -> RankProcess:
    try:  # equal for processes that can see each other's process IDs
        machine_id = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine_id = platform.node()
    return RankProcess(platform.node(), machine_id, os.getpid(), _process_stat(os.getpid())[1])


def process_state(process: RankProcess) -> str:
    """Return the state of a process of this machine: running, stopped or gone."""
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
    """Number of phases entered so far. All ranks enter the same phases."""
    waited_seconds: float
    """Time in this phase or, before the end of the first step, since the start."""
    timeout_seconds: float
    timed_out: bool
    """Whether the limit has passed. The other ranks wait until it has."""
    location: str
    """Position of the main thread in the code."""
    collective: str | None
    """The function of torch.distributed that a thread is in."""
    group_name: str | None
    """Name of that collective's process group."""
    num_collectives: dict[str, int]
    """Number of collectives started, by process group."""
    local_peer_states: dict[str, str]
    """States of the other ranks on this machine."""
    connection_error: str | None = None
    """The error, if this rank lost a connection."""
    crash_error: str | None = None
    """The error, if this rank failed for another reason."""

    @property
    def group_keys(self) -> list[str]:
        """The keys in `num_collectives` of the current collective's process group, one per kind of device."""
        return [key for key in self.num_collectives if self.collective and key.split()[0] == self.group_name]


ReportCache = dict[Path, tuple[tuple[int, int], HangReport | None]]
"""For each file: its version (inode and modification time), and its report if it contains one."""


def step_folder(hangs_folder: Path, step: int) -> Path:
    return hangs_folder / f"step-{step:08d}"


def report_path(hangs_folder: Path, step: int, rank: int) -> Path:
    return step_folder(hangs_folder, step) / f"rank-{rank:05d}.json"


def write_report(path: Path, report: HangReport, stacks: str, flight_record: bytes = b"") -> None:
    """Write the report to `path`. Beside it, write the stacks and, if there is one, torch's flight record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    atomic_write(path.with_suffix(".txt"), stacks)
    if flight_record:
        atomic_write(flight_record_path(path), flight_record)


def flight_record_path(path: Path) -> Path:
    """Return the path of the flight record beside a report, with the name that `torchfrtrace --prefix flight-` expects."""
    return path.with_name(f"flight-{int(path.stem.removeprefix('rank-'))}")


def remove_report(path: Path) -> None:
    """Remove the report at `path`, the files that belong to it, and folders that become empty."""
    for file in (path.with_suffix(".txt"), flight_record_path(path), path):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # not empty: other ranks have reports there
        path.parent.rmdir()
        path.parent.parent.rmdir()


def read_reports(hangs_folder: Path, processes: list[RankProcess], cache: ReportCache) -> dict[int, HangReport]:
    """Read the reports of this start, by rank. Update `cache`, which avoids reading unchanged files again."""
    reports: dict[int, HangReport] = {}
    for folder in hangs_folder.glob("step-*"):  # after a rollback, ranks may be many steps apart
        with suppress(OSError):
            os.utime(folder)  # otherwise a network file system may return a cached listing
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
    """Return the innermost frame of every thread, the main thread's first."""
    main = threading.main_thread().ident
    return dict(sorted(sys._current_frames().items(), key=lambda item: item[0] != main))


def find_collective(frames: dict[int, FrameType]) -> tuple[str | None, str | None]:
    """Return the collective that a thread is in, and its group's name (None: the default group).

    Searches all threads, because backward runs in a separate thread on a GPU.
    """
    for innermost in frames.values():
        calls = [frame for frame, _ in traceback.walk_stack(innermost) if is_collective_frame(frame)]
        if calls:
            return calls[-1].f_code.co_name, getattr(calls[-1].f_locals.get("group"), "group_name", None)
        # The wait for a collective that was started earlier has no Python frame, so look at the source line.
        if ".wait(" in linecache.getline(innermost.f_code.co_filename, innermost.f_lineno):
            return "wait", None
    return None, None


def is_collective_frame(frame: FrameType) -> bool:
    """Whether the frame belongs to a function of torch.distributed that communicates."""
    return frame.f_code.co_filename.endswith(("torch/distributed/distributed_c10d.py", "_functional_collectives.py"))


def format_location(frame: FrameType, line_number: int | None = None) -> str:
    """Format a frame's position as 'engine.py:88 in update'. Use `line_number` instead of its current line if given."""
    return f"{Path(frame.f_code.co_filename).name}:{line_number or frame.f_lineno} in {frame.f_code.co_name}"


def format_stacks(frames: dict[int, FrameType]) -> str:
    thread_names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {thread_names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )


def _parse_report(path: Path) -> HangReport | None:
    try:
        return parse_content(HangReport, read_json(path), path, "remove it")
    except (OSError, ValueError):  # just removed, or written by another version
        return None


def _process_stat(pid: int) -> tuple[str, int]:
    """Return a process's state and start time from Linux's /proc. The state is 'X' if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[19])
