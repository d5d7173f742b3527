"""A run that does not move is ended, with one sentence that says who did not arrive.

The one idea: all ranks of a step hang together, so each notices by its own clock and leaves a report in the run folder, which
all hosts share. When every rank that gives a sign has waited for its limit, each reads all reports and comes to the same
verdict. No network is needed, which may be what hangs. `hangs/step-00000012/` keeps reports, stacks and the verdict.
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
from math import inf
from pathlib import Path
from types import TracebackType

from tandem.trainer.config import RANK_WAIT_TIMEOUT_SECONDS, UserError
from tandem.trainer.config import WatchdogConfig as Settings
from tandem.trainer.disk import atomic_write
from tandem.trainer.distributed.watchdog import report as reporting
from tandem.trainer.distributed.watchdog.report import HangReport, RankProcess, current_process, process_state
from tandem.trainer.distributed.watchdog.verdict import peer_states, verdict
from tandem.trainer.runtime import REQUEUE_EXIT_CODE

__all__ = [
    "HANGS_FOLDER",
    "HangReport",
    "RankProcess",
    "Watchdog",
    "current_process",
    "is_connection_lost",
    "newest_verdict",
    "verdict",
]

HANGS_FOLDER = "hangs"
VERDICT_FILE = "verdict.txt"
POLL_SECONDS = 0.25
SUSPENDED_SECONDS = 5.0
"""A tick that comes so late says that this process was stopped: no time in which the others did not move."""
MEDIAN_WINDOW_STEPS = 32
TIMEOUT_MEDIANS = 10
MIN_TIMEOUT_SECONDS = 60.0
REPORT_FRACTION = 0.8
"""Reports are left at this share of the limit: ranks are up to a step apart, and no living one may be missing at the end."""
DATA_TIMEOUT_SECONDS = RANK_WAIT_TIMEOUT_SECONDS + 60
"""A slow store has its own patience, which ends in a message of its own (`data.cache`)."""
DISK_PHASES = ("save", "rollback", "end")
"""In these a disk or a server is waited for, which is no hang for as long as a start may take."""
GONE_PEER_TIMEOUT_SECONDS = 30.0
"""So long a rank waits on in the store once it sees that another of its machine is gone."""
REPORT_WAIT_SECONDS = 10.0
EXIT_DEADLINE_SECONDS = 25.0
"""So long after the limit the process ends even where the file system hangs as well."""
CONNECTION_LOST_PATTERN = re.compile(
    r"gloo/transport|Connection (closed|reset|refused|was likely closed)|Broken pipe|Socket (closed|Timeout)"
    r"|nccl(Remote|System)Error|[Tt]imed? ?out|aborted"
)
"""What torch says when a peer has gone or does not answer."""

log = logging.getLogger(__name__)


class Watchdog:
    """Within the block a run that does not move is ended with REQUEUE_EXIT_CODE, on all ranks, with a verdict on record.

    So is one that has lost the connection to a rank: the block then raises SystemExit. A rank that fails by itself leaves a
    report for the others, and its error goes on up.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        processes: list[RankProcess],
        rank: int,
        collectives: Callable[[], dict[str, int]],
        *,
        flight_record: Callable[[], bytes] = bytes,
        data_timeout_seconds: float = DATA_TIMEOUT_SECONDS,
    ) -> None:
        self._settings, self._processes, self._rank, self._collectives = settings, processes, rank, collectives
        self._hangs_folder, self._data_timeout_seconds, self._flight_record = (
            folder / HANGS_FOLDER,
            data_timeout_seconds,
            flight_record,
        )
        self._local_peers = [
            (other, process)
            for other, process in enumerate(processes)
            if other != rank and process.machine_id == processes[rank].machine_id
        ]
        self._current_phase, self._waits_in_store, self._gone_peer_timeout_seconds = ("start", 0, 0), False, inf
        self._recent_step_seconds: deque[float] = deque(maxlen=MEDIAN_WINDOW_STEPS)
        self._timeout_seconds = settings.start_timeout_seconds or inf
        self._waited_seconds = 0.0
        self._report_file: Path | None = None
        self._exit_deadline = (self._current_phase, inf)
        self._stop, self._exited, self._lock, self._timed_out = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
            False,
        )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """The main thread enters a phase of the work on step number `step`, None: the last one named. All ranks enter the same
        phases in one order.
        """
        self._current_phase = (phase, self._current_phase[1] if step is None else step, self._current_phase[2] + 1)

    def use_start_timeout(self) -> None:
        """The next step may take as long as a first one: kernels are compiled for rows of another shape."""
        self._timeout_seconds = max(self._timeout_seconds, self._settings.start_timeout_seconds or inf)

    def finish_step(self, step_seconds: float) -> None:
        """A step is made, and took so long."""
        self._recent_step_seconds.append(step_seconds)
        if self._settings.step_timeout_seconds is None:
            self._timeout_seconds = max(
                MIN_TIMEOUT_SECONDS, TIMEOUT_MEDIANS * statistics.median(self._recent_step_seconds)
            )
        else:
            self._timeout_seconds = self._settings.step_timeout_seconds or inf

    @contextmanager
    def store_wait(self) -> Iterator[None]:
        """Within the block this rank has done its part and waits for all others through the store: there, unlike in a
        connection, nobody hears that one has gone.
        """
        self._waits_in_store = True
        try:
            yield
        finally:
            self._waits_in_store = False

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        threading.Thread(target=self._enforce_exit_deadline, name="watchdog's deadline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_lost = error is not None and is_connection_lost(error)
        with self._lock:
            self._stop.set()
            timed_out = self._timed_out
        if not is_lost:
            self.enter_phase(*self._current_phase[:2])  # a verdict in the making is void: this rank got out
        elif (
            timed_out
        ):  # another rank's end has thrown this one out of its collective; the thread is about to end it too
            self._thread.join(EXIT_DEADLINE_SECONDS)
        self._thread.join(SUSPENDED_SECONDS)
        if is_lost and error:
            self._end_on_lost_connection(error)
        elif error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            self._remove_report()
        else:
            self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
            self._write_report(timed_out=True, crash_error=_format_error(error), error=error)
        self._exited.set()

    def _watch(self) -> None:
        current_phase, phase_seconds, since_start, last_poll = self._current_phase, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            gap, last_poll = time.monotonic() - last_poll, time.monotonic()
            awake_seconds = gap if gap < SUSPENDED_SECONDS else POLL_SECONDS
            if self._current_phase is not current_phase:
                self._remove_report()
                current_phase, phase_seconds = self._current_phase, 0.0
            phase_seconds, since_start = phase_seconds + awake_seconds, since_start + awake_seconds
            self._waited_seconds = phase_seconds if self._recent_step_seconds else since_start
            if not (self._waits_in_store and any(process_state(process) == "gone" for _, process in self._local_peers)):
                self._gone_peer_timeout_seconds = inf
            elif self._gone_peer_timeout_seconds == inf:
                self._gone_peer_timeout_seconds = round(self._waited_seconds + GONE_PEER_TIMEOUT_SECONDS, 1)
            timeout_seconds = self._phase_timeout_seconds(current_phase[0])
            if self._waited_seconds >= timeout_seconds:
                self._end_on_timeout(current_phase)
            elif self._waited_seconds >= REPORT_FRACTION * self._timeout_seconds and not self._report_file:
                self._set_exit_deadline(timeout_seconds - self._waited_seconds + EXIT_DEADLINE_SECONDS)
                self._write_report(timed_out=False)

    def _phase_timeout_seconds(self, phase: str) -> float:
        if phase in DISK_PHASES:
            timeout_seconds = max(self._timeout_seconds, self._settings.start_timeout_seconds or inf)
            return min(timeout_seconds, self._gone_peer_timeout_seconds) if timeout_seconds < inf else inf
        return max(self._timeout_seconds, self._data_timeout_seconds) if phase == "data" else self._timeout_seconds

    def _end_on_timeout(self, current_phase: tuple[str, int, int]) -> None:
        """Ends the process once all who give a sign have waited for their limit; returns if the main thread moves first."""
        with self._lock:
            if self._stop.is_set():
                return
            self._timed_out = True
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
        self._write_report(timed_out=True)
        report_cache: reporting.ReportCache = {}
        report_deadlines: dict[int, float] = {}
        quiet_since = time.monotonic()
        while self._current_phase is current_phase:
            all_reports, current_time = (
                reporting.read_reports(self._hangs_folder, self._processes, report_cache),
                time.monotonic(),
            )
            reports = {}
            for rank, report in all_reports.items():
                remaining_seconds = report.timeout_seconds - report.waited_seconds + REPORT_WAIT_SECONDS
                if report.timed_out or current_time < report_deadlines.setdefault(
                    rank, current_time + remaining_seconds
                ):
                    reports[rank] = report
            if not all(report.timed_out for report in reports.values()):
                quiet_since = current_time
                self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
            elif self._all_ranks_known(reports) or current_time - quiet_since > REPORT_WAIT_SECONDS:
                self._write_verdict(reports)
                if self._rank in reports:  # else it is the file system that keeps silent
                    self._kill_silent_peers(reports)
                sys.stderr.flush()
                os._exit(REQUEUE_EXIT_CODE)
            time.sleep(POLL_SECONDS)
        self._timed_out = False

    def _end_on_lost_connection(self, error: BaseException) -> None:
        """Raises SystemExit once the verdict is on record."""
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)
        time.sleep(2 * POLL_SECONDS)  # the kernel closes a dying process's connections a moment before it is gone
        self._write_report(timed_out=True, connection_error=_format_error(error), error=error)
        start_time, reports = time.monotonic(), dict[int, HangReport]()
        report_cache: reporting.ReportCache = {}
        while not self._all_ranks_known(reports) and time.monotonic() - start_time < REPORT_WAIT_SECONDS:
            time.sleep(POLL_SECONDS)
            reports = reporting.read_reports(self._hangs_folder, self._processes, report_cache)
        self._write_verdict(reports)
        self._set_exit_deadline(EXIT_DEADLINE_SECONDS)  # what tears groups down may wait for the lost rank once more
        raise SystemExit(REQUEUE_EXIT_CODE) from error

    def _write_report(
        self,
        *,
        timed_out: bool,
        connection_error: str | None = None,
        crash_error: str | None = None,
        error: BaseException | None = None,
    ) -> None:
        """This rank's report and stacks lie in the run folder, if it can be written to."""
        frames = reporting.thread_frames()
        location, stacks = reporting.format_location(next(iter(frames.values()))), reporting.format_stacks(frames)
        if error:
            last, number = list(traceback.walk_tb(error.__traceback__))[-1]
            location, stacks = (
                reporting.format_location(last, number),
                "".join(traceback.format_exception(error)) + "\n" + stacks,
            )
        (phase, step, num_phases), timeout_seconds = (
            self._current_phase,
            self._phase_timeout_seconds(self._current_phase[0]),
        )
        collective, group_name = reporting.find_collective(frames)
        num_collectives = self._collectives()
        local_peer_states = {str(rank): process_state(process) for rank, process in self._local_peers}
        report = HangReport(
            self._rank,
            self._processes[self._rank],
            phase,
            step,
            num_phases,
            round(self._waited_seconds, 1),
            timeout_seconds,
            timed_out,
            location,
            collective,
            group_name or next(iter(num_collectives), None),
            num_collectives,
            local_peer_states,
            connection_error,
            crash_error,
        )
        self._report_file = reporting.report_path(self._hangs_folder, step, self._rank)
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
        """Each rank has left a report or is known, on its host, to be unable to; or one has said why it crashed."""
        states_by_rank = peer_states(reports) | {rank: process_state(process) for rank, process in self._local_peers}
        silent_ranks = {rank for rank, found in states_by_rank.items() if found in ("gone", "stopped")}
        return any(report.crash_error for report in reports.values()) or len(silent_ranks | set(reports)) == len(
            self._processes
        )

    def _write_verdict(self, reports: dict[int, HangReport]) -> None:
        """The verdict is in the run folder, and logged once on each host."""
        if not reports:  # the file system takes nothing
            log.error(
                "step %d: no progress or a connection was lost, and no report can be read in %s",
                self._current_phase[1],
                self._hangs_folder,
            )
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
        """The process ends after `seconds`, unless the main thread moves or this is called again."""
        self._exit_deadline = (self._current_phase, time.monotonic() + seconds)

    def _enforce_exit_deadline(self) -> None:
        armed, last_poll = False, time.monotonic()
        while not self._exited.wait(1):
            gap, last_poll = time.monotonic() - last_poll, time.monotonic()
            deadline_phase, deadline = self._exit_deadline
            if (
                gap >= SUSPENDED_SECONDS and deadline < inf
            ):  # the thread that is to tell the verdict has stood still as well
                deadline += gap
                self._exit_deadline = (deadline_phase, deadline)
            if self._current_phase is deadline_phase and deadline < inf:
                if time.monotonic() > deadline:
                    os._exit(REQUEUE_EXIT_CODE)
                # Ends it, with code 1, also where something holds the interpreter from here on.
                faulthandler.dump_traceback_later(deadline - time.monotonic() + 4, exit=True, file=2)
                armed = True
            elif armed:
                faulthandler.cancel_dump_traceback_later()
                armed = False
        if armed:
            faulthandler.cancel_dump_traceback_later()


def is_connection_lost(error: BaseException) -> bool:
    """Whether a rank has left, or did not answer, while this one was in a collective."""
    if not isinstance(error, RuntimeError) or not CONNECTION_LOST_PATTERN.search(str(error)):
        return False
    in_collective = any(reporting.is_collective_frame(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return (
        in_collective or "DistError" in kinds or "gloo/transport" in str(error)
    )  # the last: one begun before, waited for


def newest_verdict(folder: Path, since: float) -> str | None:
    """The last verdict in a run folder, if it was written after the Unix time `since`."""
    found = [(path.stat().st_mtime, path) for path in (folder / HANGS_FOLDER).glob(f"step-*/{VERDICT_FILE}")]
    if not found or max(found)[0] < since:
        return None
    return max(found)[1].read_text().strip()


def _format_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
