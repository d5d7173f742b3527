"""End a run that hangs, and report which rank the others were waiting for.

If the main thread of a rank stays in one phase for longer than the limit, the rank writes a report to `hangs/step-00000012/` in
the run folder, which all hosts share. Once every rank that responds has reached its limit, each rank reads all reports and
computes the same verdict, and all exit with REQUEUE_EXIT_CODE. The ranks communicate only through files, because the network
may be down.
"""

import faulthandler
import logging
import os
import re
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from tandem.trainer.config import RANK_WAIT_TIMEOUT_SECONDS, UserError
from tandem.trainer.config import WatchdogConfig as Settings
from tandem.trainer.config.outside import escape_control_characters, read_file
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.watchdog import report as reporting
from tandem.trainer.distributed.watchdog.report import HangReport, RankProcess, current_process, process_state
from tandem.trainer.distributed.watchdog.verdict import peer_states, verdict
from tandem.trainer.runtime.signals import REQUEUE_EXIT_CODE

__all__ = ["HANGS_FOLDER", "Watchdog", "current_process", "gather_processes", "is_connection_lost", "newest_verdict"]

HANGS_FOLDER = "hangs"
VERDICT_FILE = "verdict.txt"
MAX_VERDICT_BYTES = 1 << 16
POLL_SECONDS = 0.25
SUSPENDED_SECONDS = 5.0
"""A poll is this late only if the process was suspended. That time is ignored, because a suspended run is not hung."""
MEDIAN_WINDOW_STEPS = 32
TIMEOUT_MEDIANS = 10
MIN_TIMEOUT_SECONDS = 60.0
REPORT_FRACTION = 0.8
"""Ranks write a first report at this fraction of the limit. They can be a step apart, but every live rank must have a report
when the first rank reaches its limit."""
DATA_TIMEOUT_SECONDS = RANK_WAIT_TIMEOUT_SECONDS + 60
"""Limit while waiting for data. Reads from remote servers have a shorter limit (`data.cache`) and their own error."""
DISK_PHASES = ("save", "rollback", "end")
"""Phases that wait for a disk or a server. Each may take as long as a start."""
GONE_PEER_TIMEOUT_SECONDS = 30.0
"""Extra time for a wait in the key-value store after a rank on this machine is found to be gone."""
REPORT_WAIT_SECONDS = 10.0
EXIT_DEADLINE_SECONDS = 25.0
"""Time after the limit at which the process exits even if the file system hangs too."""
CONNECTION_LOST_PATTERN = re.compile(
    r"gloo/transport|Connection (closed|reset|refused|was likely closed)|Broken pipe|Socket (closed|Timeout)"
    r"|nccl(Remote|System)Error|[Tt]imed? ?out|aborted"
)
"""Matches torch's errors for a rank that is gone or does not answer."""

log = logging.getLogger(__name__)


class _Phase(NamedTuple):
    name: str
    step: int
    number: int
    """Number of phases entered before this one."""


class Watchdog:
    """Ends a run that hangs inside the `with` block: all ranks exit with REQUEUE_EXIT_CODE and leave a verdict.

    If this rank loses the connection to another one, the block raises SystemExit with the same code. If this rank fails with an
    error, it leaves a report for the others, and the error propagates.
    """

    def __init__(
        self, settings: Settings, folder: Path, processes: list[RankProcess], rank: int,
        collectives: Callable[[], dict[str, int]], *,
        flight_record: Callable[[], bytes] = bytes, data_timeout_seconds: float = DATA_TIMEOUT_SECONDS,
    ) -> None:  # fmt: skip
        self._settings, self._processes, self._rank, self._collectives = settings, processes, rank, collectives
        self._hangs_folder, self._flight_record = folder / HANGS_FOLDER, flight_record
        self._data_timeout_seconds = data_timeout_seconds
        machine_id = processes[rank].machine_id
        self._local_peers = [
            (other, process) for other, process in enumerate(processes) if other != rank and process.machine_id == machine_id
        ]  # fmt: skip
        self._phase, self._waits_in_store, self._gone_peer_timeout_seconds = _Phase("start", 0, 0), False, inf
        self._recent_step_seconds: deque[float] = deque(maxlen=MEDIAN_WINDOW_STEPS)
        self._timeout_seconds = settings.start_timeout_seconds or inf
        self._waited_seconds = 0.0
        self._report_file: Path | None = None
        self._read_reports = partial(reporting.read_reports, self._hangs_folder, processes, {})
        self._exit_deadline = (self._phase, inf)
        self._stop, self._exited = threading.Event(), threading.Event()
        self._lock, self._timed_out = threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """Record that the main thread enters a phase of `step` (default: unchanged). All ranks must enter the same phases."""
        self._phase = _Phase(phase, self._phase.step if step is None else step, self._phase.number + 1)

    def use_start_timeout(self) -> None:
        """Allow the next step as much time as the first, because it compiles kernels for rows of another shape."""
        self._timeout_seconds = max(self._timeout_seconds, self._settings.start_timeout_seconds or inf)

    def finish_step(self, step_seconds: float) -> None:
        """Record the duration of a finished step, and set the limit for the next."""
        self._recent_step_seconds.append(step_seconds)
        if self._settings.step_timeout_seconds is None:
            median_seconds = statistics.median(self._recent_step_seconds)
            self._timeout_seconds = max(MIN_TIMEOUT_SECONDS, TIMEOUT_MEDIANS * median_seconds)
        else:
            self._timeout_seconds = self._settings.step_timeout_seconds or inf

    @contextmanager
    def store_wait(self) -> Iterator[None]:
        """Mark the block as a wait in the key-value store. Unlike a collective, such a wait does not fail if a rank is gone."""
        self._waits_in_store = True
        try:
            yield
        finally:
            self._waits_in_store = False

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        threading.Thread(target=self._enforce_exit_deadline, name="watchdog's deadline", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        is_lost = error is not None and is_connection_lost(error)
        with self._lock:
            self._stop.set()
            timed_out = self._timed_out
        if not is_lost:
            self.enter_phase(self._phase.name)  # cancels a verdict in progress: this rank is not stuck
        elif timed_out:  # another rank's exit broke this one's collective; `_watch` is about to end the process
            self._thread.join(EXIT_DEADLINE_SECONDS)
        self._thread.join(SUSPENDED_SECONDS)
        if is_lost and error:
            self._end_on_lost_connection(error)
        elif error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            self._remove_report()
        else:
            self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
            self._write_report(timed_out=True, error=error)
        self._exited.set()

    def _watch(self) -> None:
        phase, phase_seconds, since_start, last_poll = self._phase, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            gap, last_poll = time.monotonic() - last_poll, time.monotonic()
            awake_seconds = gap if gap < SUSPENDED_SECONDS else POLL_SECONDS
            if self._phase is not phase:
                self._remove_report()
                phase, phase_seconds = self._phase, 0.0
            phase_seconds, since_start = phase_seconds + awake_seconds, since_start + awake_seconds
            self._waited_seconds = phase_seconds if self._recent_step_seconds else since_start
            if not (self._waits_in_store and any(process_state(process) == "gone" for _, process in self._local_peers)):
                self._gone_peer_timeout_seconds = inf
            elif self._gone_peer_timeout_seconds == inf:
                self._gone_peer_timeout_seconds = round(self._waited_seconds + GONE_PEER_TIMEOUT_SECONDS, 1)
            timeout_seconds = self._phase_timeout_seconds(phase.name)
            if self._waited_seconds >= timeout_seconds:
                self._end_on_timeout(phase)
            elif self._waited_seconds >= REPORT_FRACTION * self._timeout_seconds and not self._report_file:
                self._set_exit_deadline(timeout_seconds - self._waited_seconds + EXIT_DEADLINE_SECONDS)
                self._write_report(timed_out=False)

    def _phase_timeout_seconds(self, phase: str) -> float:
        if phase in DISK_PHASES:
            timeout_seconds = max(self._timeout_seconds, self._settings.start_timeout_seconds or inf)
            return min(timeout_seconds, self._gone_peer_timeout_seconds) if timeout_seconds < inf else inf
        return max(self._timeout_seconds, self._data_timeout_seconds) if phase == "data" else self._timeout_seconds

    def _end_on_timeout(self, phase: _Phase) -> None:
        """End the process once all ranks that respond have timed out. Return if the main thread enters another phase first."""
        with self._lock:
            if self._stop.is_set():
                return
            self._timed_out = True
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
        self._write_report(timed_out=True)
        report_deadlines: dict[int, float] = {}
        quiet_since = time.monotonic()
        while self._phase is phase:
            all_reports, reports = self._read_reports(), {}
            current_time = time.monotonic()
            for rank, report in all_reports.items():
                deadline = current_time + report.timeout_seconds - report.waited_seconds + REPORT_WAIT_SECONDS
                if report.timed_out or current_time < report_deadlines.setdefault(rank, deadline):
                    reports[rank] = report
            if not all(report.timed_out for report in reports.values()):
                quiet_since = current_time
                self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
            elif self._all_ranks_known(reports) or current_time - quiet_since > REPORT_WAIT_SECONDS:
                self._write_verdict(reports)
                if self._rank in reports:  # otherwise the file system hangs, and the peers may be healthy
                    self._kill_silent_peers(reports)
                sys.stderr.flush()
                os._exit(REQUEUE_EXIT_CODE)
            time.sleep(POLL_SECONDS)
        self._timed_out = False

    def _end_on_lost_connection(self, error: BaseException) -> None:
        """Write the verdict, then raise SystemExit."""
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
        time.sleep(2 * POLL_SECONDS)  # a dying process's connections close shortly before the process is gone
        self._write_report(timed_out=True, error=error, is_lost=True)
        start_time, reports = time.monotonic(), dict[int, HangReport]()
        while not self._all_ranks_known(reports) and time.monotonic() - start_time < REPORT_WAIT_SECONDS:
            time.sleep(POLL_SECONDS)
            reports = self._read_reports()
        self._write_verdict(reports)
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)  # destroying the groups may wait for the lost rank again
        raise SystemExit(REQUEUE_EXIT_CODE) from error

    def _write_report(self, *, timed_out: bool, error: BaseException | None = None, is_lost: bool = False) -> None:
        """Write this rank's report and stacks to the run folder. Log a warning if that fails.

        `is_lost`: `error` is a lost connection, not a crash of this rank.
        """
        frames = reporting.thread_frames()
        location, stacks = reporting.format_location(next(iter(frames.values()))), reporting.format_stacks(frames)
        error_text = None
        if error:
            error_text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            location = reporting.format_location(*list(traceback.walk_tb(error.__traceback__))[-1])
            stacks = "".join(traceback.format_exception(error)) + "\n" + stacks
        phase, num_collectives = self._phase, self._collectives()
        collective, group_name = reporting.find_collective(frames)
        report = HangReport(
            rank=self._rank, process=self._processes[self._rank], phase=phase.name, step=phase.step, num_phases=phase.number,
            waited_seconds=round(self._waited_seconds, 1), timeout_seconds=self._phase_timeout_seconds(phase.name),
            timed_out=timed_out, location=location, collective=collective,
            group_name=group_name or next(iter(num_collectives), None), num_collectives=num_collectives,
            local_peer_states={str(rank): process_state(process) for rank, process in self._local_peers},
            connection_error=error_text if is_lost else None, crash_error=None if is_lost else error_text,
        )  # fmt: skip
        self._report_file = reporting.report_path(self._hangs_folder, phase.step, self._rank)
        try:
            reporting.write_report(self._report_file, report, stacks, self._flight_record())
        except OSError as refused:
            log.warning("%s cannot be written (%s)", self._report_file, refused.strerror)

    def _remove_report(self) -> None:
        self._set_exit_deadline(inf)
        if self._report_file:
            reporting.remove_report(self._report_file)
            self._report_file = None

    def _all_ranks_known(self, reports: dict[int, HangReport]) -> bool:
        """Whether a rank has reported a crash, or every rank is accounted for.

        A rank is accounted for if it has a report, or if a rank on its host saw that it is gone or stopped.
        """
        states = peer_states(reports) | {rank: process_state(process) for rank, process in self._local_peers}
        silent_ranks = {rank for rank, state in states.items() if state in ("gone", "stopped")}
        has_crash = any(report.crash_error for report in reports.values())
        return has_crash or len(silent_ranks | set(reports)) == len(self._processes)

    def _write_verdict(self, reports: dict[int, HangReport]) -> None:
        """Write the verdict to the run folder once, and log it once on each host."""
        if not reports:  # the file system does not work
            message = "step %d: no progress or a lost connection; no reports can be read in %s"
            log.error(message, self._phase.step, self._hangs_folder)
            return
        folder = reporting.step_folder(self._hangs_folder, min(report.step for report in reports.values()))
        words = verdict(reports, self._processes, folder)
        reporting_ranks = {rank for rank, report in reports.items() if not report.crash_error} | {self._rank}
        if self._rank == min(reporting_ranks & {self._rank, *(rank for rank, _ in self._local_peers)}):
            log.error("%s", words)
        if self._rank == min(reporting_ranks):
            try:
                atomic_write(folder / VERDICT_FILE, words + "\n")
            except OSError as refused:
                log.warning("%s cannot be written (%s)", folder / VERDICT_FILE, refused.strerror)

    def _kill_silent_peers(self, reports: dict[int, HangReport]) -> None:
        for rank, process in self._local_peers:
            if rank not in reports and process_state(process) != "gone":
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)

    def _set_exit_deadline(self, seconds: float) -> None:
        """End the process after `seconds`, unless the main thread enters another phase or this is called again."""
        self._exit_deadline = (self._phase, time.monotonic() + seconds)

    def _enforce_exit_deadline(self) -> None:
        last_poll = time.monotonic()
        while not self._exited.wait(1):
            gap, last_poll = time.monotonic() - last_poll, time.monotonic()
            phase, deadline = self._exit_deadline
            if gap >= SUSPENDED_SECONDS and deadline < inf:  # the thread that writes the verdict was suspended too
                deadline += gap
                self._exit_deadline = (phase, deadline)
            if self._phase is phase and deadline < inf:
                if time.monotonic() > deadline:
                    os._exit(REQUEUE_EXIT_CODE)
                # This exits with code 1, even if another thread never releases the interpreter lock.
                faulthandler.dump_traceback_later(deadline - time.monotonic() + 4, exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()
        faulthandler.cancel_dump_traceback_later()


def gather_processes() -> list[RankProcess]:
    """Return the processes of all ranks, in order of rank. All ranks must call this."""
    from tandem.trainer.distributed.mesh import all_gather_values  # here, because `crash_loop` must not import torch

    return [RankProcess(**each) for each in all_gather_values(vars(current_process()))]


def is_connection_lost(error: BaseException) -> bool:
    """Whether the error means that another rank exited or did not answer while this one was in a collective."""
    if not isinstance(error, RuntimeError) or not CONNECTION_LOST_PATTERN.search(str(error)):
        return False
    in_collective = any(reporting.is_collective_frame(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    is_dist_error = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    # An error that is raised while waiting for an earlier collective has no frame in torch.distributed; its message names gloo.
    return in_collective or is_dist_error or "gloo/transport" in str(error)


def newest_verdict(folder: Path, since: float) -> str | None:
    """Read the newest verdict in a run folder; None if it is older than the Unix time `since`."""
    try:
        found = [(path.stat().st_mtime, path) for path in (folder / HANGS_FOLDER).glob(f"step-*/{VERDICT_FILE}")]
        if not found or max(found)[0] < since:
            return None
        text = read_file(max(found)[1], MAX_VERDICT_BYTES).decode(errors="replace")
    except OSError:  # just removed, or not a file
        return None
    return escape_control_characters(" ".join(text.split()))
