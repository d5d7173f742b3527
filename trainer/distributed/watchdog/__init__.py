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

from tandem.trainer.config import RANKS_WAIT_SECONDS, UserError
from tandem.trainer.config import Watchdog as Settings
from tandem.trainer.disk import write_whole
from tandem.trainer.distributed.watchdog import report as reporting
from tandem.trainer.distributed.watchdog.report import Place, Report, here, state
from tandem.trainer.distributed.watchdog.verdict import states, verdict
from tandem.trainer.runtime import REQUEUE_EXIT_CODE

__all__ = ["FOLDER", "Place", "Report", "Watchdog", "connection_lost", "here", "newest_verdict", "verdict"]

FOLDER = "hangs"
VERDICT_FILE = "verdict.txt"
TICK_SECONDS = 0.25
FROZEN_SECONDS = 5.0
"""A tick that comes so late says that this process was stopped: no time in which the others did not move."""
MEDIAN_STEPS = 32
MEDIANS = 10
MIN_LIMIT_SECONDS = 60.0
NOTICE_FRACTION = 0.8
"""Reports are left at this share of the limit: ranks are up to a step apart, and no living one may be missing at the end."""
DATA_SECONDS = RANKS_WAIT_SECONDS + 60
"""A slow store has its own patience, which ends in a message of its own (`data.cache`)."""
DISK_PHASES = ("save", "rollback", "end")
"""In these a disk or a server is waited for, which is no hang for as long as a start may take."""
GONE_SECONDS = 30.0
"""So long a rank waits on in the store once it sees that another of its machine is gone."""
ANSWER_SECONDS = 10.0
DEADLINE_SECONDS = 25.0
"""So long after the limit the process ends even where the file system hangs as well."""
LOST = re.compile(
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
        places: list[Place],
        rank: int,
        collectives: Callable[[], dict[str, int]],
        *,
        flight_record: Callable[[], bytes] = bytes,
        data_seconds: float = DATA_SECONDS,
    ) -> None:
        self._settings, self._places, self._rank, self._collectives = settings, places, rank, collectives
        self._hangs, self._data_seconds, self._flight_record = folder / FOLDER, data_seconds, flight_record
        self._neighbours = [
            (other, place)
            for other, place in enumerate(places)
            if other != rank and place.machine == places[rank].machine
        ]
        self._now, self._in_store, self._gone_limit = ("start", 0, 0), False, inf
        self._steps: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._limit = settings.start_seconds or inf
        self._waited = 0.0
        self._file: Path | None = None
        self._deadline = (self._now, inf)
        self._stop, self._ended, self._lock, self._over = threading.Event(), threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, phase: str, step: int | None = None) -> None:
        """The main thread enters a phase of the work on step number `step`, None: the last one named. All ranks enter the same
        phases in one order.
        """
        self._now = (phase, self._now[1] if step is None else step, self._now[2] + 1)

    def patient(self) -> None:
        """The next step may take as long as a first one: kernels are compiled for rows of another shape."""
        self._limit = max(self._limit, self._settings.start_seconds or inf)

    def finished(self, seconds: float) -> None:
        """A step is made, and took so long."""
        self._steps.append(seconds)
        if self._settings.step_seconds is None:
            self._limit = max(MIN_LIMIT_SECONDS, MEDIANS * statistics.median(self._steps))
        else:
            self._limit = self._settings.step_seconds or inf

    @contextmanager
    def in_store(self) -> Iterator[None]:
        """Within the block this rank has done its part and waits for all others through the store: there, unlike in a
        connection, nobody hears that one has gone.
        """
        self._in_store = True
        try:
            yield
        finally:
            self._in_store = False

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        threading.Thread(target=self._end_late, name="watchdog's deadline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = error is not None and connection_lost(error)
        with self._lock:
            self._stop.set()
            over = self._over
        if not lost:
            self.at(*self._now[:2])  # a verdict in the making is void: this rank got out
        elif over:  # another rank's end has thrown this one out of its collective; the thread is about to end it too
            self._thread.join(DEADLINE_SECONDS)
        self._thread.join(FROZEN_SECONDS)
        if lost and error:
            self._end_by_loss(error)
        elif error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            self._withdraw()
        else:
            self._end_by(DEADLINE_SECONDS)
            self._leave(over=True, crashed=_one_line(error), error=error)
        self._ended.set()

    def _watch(self) -> None:
        now, seconds, since_start, before = self._now, 0.0, 0.0, time.monotonic()
        while not self._stop.wait(TICK_SECONDS):
            gap, before = time.monotonic() - before, time.monotonic()
            awake = gap if gap < FROZEN_SECONDS else TICK_SECONDS
            if self._now is not now:
                self._withdraw()
                now, seconds = self._now, 0.0
            seconds, since_start = seconds + awake, since_start + awake
            self._waited = seconds if self._steps else since_start
            if not (self._in_store and any(state(place) == "gone" for _, place in self._neighbours)):
                self._gone_limit = inf
            elif self._gone_limit == inf:
                self._gone_limit = round(self._waited + GONE_SECONDS, 1)
            limit = self._own_limit(now[0])
            if self._waited >= limit:
                self._alarm(now)
            elif self._waited >= NOTICE_FRACTION * self._limit and not self._file:
                self._end_by(limit - self._waited + DEADLINE_SECONDS)
                self._leave(over=False)

    def _own_limit(self, phase: str) -> float:
        if phase in DISK_PHASES:
            limit = max(self._limit, self._settings.start_seconds or inf)
            return min(limit, self._gone_limit) if limit < inf else inf
        return max(self._limit, self._data_seconds) if phase == "data" else self._limit

    def _alarm(self, now: tuple[str, int, int]) -> None:
        """Ends the process once all who give a sign have waited for their limit; returns if the main thread moves first."""
        with self._lock:
            if self._stop.is_set():
                return
            self._over = True
        self._end_by(DEADLINE_SECONDS)
        self._leave(over=True)
        seen: reporting.Seen = {}
        patience: dict[int, float] = {}
        quiet_since = time.monotonic()
        while self._now is now:
            read, moment = reporting.read(self._hangs, self._places, seen), time.monotonic()
            reports = {}
            for rank, report in read.items():
                left = report.limit_seconds - report.seconds + ANSWER_SECONDS
                if report.over or moment < patience.setdefault(rank, moment + left):
                    reports[rank] = report
            if not all(report.over for report in reports.values()):
                quiet_since = moment
                self._end_by(DEADLINE_SECONDS)
            elif self._all_known(reports) or moment - quiet_since > ANSWER_SECONDS:
                self._conclude(reports)
                if self._rank in reports:  # else it is the file system that keeps silent
                    self._kill_silent(reports)
                sys.stderr.flush()
                os._exit(REQUEUE_EXIT_CODE)
            time.sleep(TICK_SECONDS)
        self._over = False

    def _end_by_loss(self, error: BaseException) -> None:
        """Raises SystemExit once the verdict is on record."""
        self._end_by(DEADLINE_SECONDS)
        time.sleep(2 * TICK_SECONDS)  # the kernel closes a dying process's connections a moment before it is gone
        self._leave(over=True, lost=_one_line(error), error=error)
        began, reports = time.monotonic(), dict[int, Report]()
        seen: reporting.Seen = {}
        while not self._all_known(reports) and time.monotonic() - began < ANSWER_SECONDS:
            time.sleep(TICK_SECONDS)
            reports = reporting.read(self._hangs, self._places, seen)
        self._conclude(reports)
        self._end_by(DEADLINE_SECONDS)  # what tears groups down may wait for the lost rank once more
        raise SystemExit(REQUEUE_EXIT_CODE) from error

    def _leave(
        self, *, over: bool, lost: str | None = None, crashed: str | None = None, error: BaseException | None = None
    ) -> None:
        """This rank's report and stacks lie in the run folder, if it can be written to."""
        frames = reporting.frames()
        line, stacks = reporting.line(next(iter(frames.values()))), reporting.stacks(frames)
        if error:
            last, number = list(traceback.walk_tb(error.__traceback__))[-1]
            line, stacks = reporting.line(last, number), "".join(traceback.format_exception(error)) + "\n" + stacks
        (phase, step, moves), limit = self._now, self._own_limit(self._now[0])
        collective, group = reporting.standing(frames)
        numbers = self._collectives()
        neighbours = {str(rank): state(place) for rank, place in self._neighbours}
        report = Report(
            self._rank, self._places[self._rank], phase, step, moves, round(self._waited, 1), limit, over, line,
            collective, group or next(iter(numbers), None), numbers, neighbours, lost, crashed,
        )  # fmt: skip
        self._file = reporting.file_of(self._hangs, step, self._rank)
        try:
            reporting.write(self._file, report, stacks, self._flight_record())
        except OSError as refused:
            log.warning("%s cannot be written (%s)", self._file, refused.strerror)

    def _withdraw(self) -> None:
        self._end_by(inf)
        if self._file:
            reporting.remove(self._file)
            self._file = None

    def _all_known(self, reports: dict[int, Report]) -> bool:
        """Each rank has left a report or is known, on its host, to be unable to; or one has said why it crashed."""
        known = states(reports) | {rank: state(place) for rank, place in self._neighbours}
        unable = {rank for rank, found in known.items() if found in ("gone", "stopped")}
        return any(report.crashed for report in reports.values()) or len(unable | set(reports)) == len(self._places)

    def _conclude(self, reports: dict[int, Report]) -> None:
        """The verdict is in the run folder, and logged once on each host."""
        if not reports:  # the file system takes nothing
            log.error(
                "step %d: no progress or a connection was lost, and no report can be read in %s",
                self._now[1],
                self._hangs,
            )
            return
        folder = reporting.step_folder(self._hangs, min(report.step for report in reports.values()))
        words = verdict(reports, self._places, folder)
        alive = {rank for rank, report in reports.items() if not report.crashed} | {self._rank}
        if self._rank == min(alive & {self._rank, *(rank for rank, _ in self._neighbours)}):
            log.error("%s", words)
        if self._rank == min(alive):
            try:
                write_whole(folder / VERDICT_FILE, words + "\n")
            except OSError as refused:
                log.warning("%s cannot be written (%s)", folder / VERDICT_FILE, refused.strerror)

    def _kill_silent(self, reports: dict[int, Report]) -> None:
        for rank, place in self._neighbours:
            if rank not in reports and state(place) != "gone":
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(place.pid, signal.SIGKILL)

    def _end_by(self, seconds: float) -> None:
        """The process ends after `seconds`, unless the main thread moves or this is called again."""
        self._deadline = (self._now, time.monotonic() + seconds)

    def _end_late(self) -> None:
        armed, before = False, time.monotonic()
        while not self._ended.wait(1):
            gap, before = time.monotonic() - before, time.monotonic()
            now, moment = self._deadline
            if gap >= FROZEN_SECONDS and moment < inf:  # the thread that is to tell the verdict has stood still as well
                moment += gap
                self._deadline = (now, moment)
            if self._now is now and moment < inf:
                if time.monotonic() > moment:
                    os._exit(REQUEUE_EXIT_CODE)
                # Ends it, with code 1, also where something holds the interpreter from here on.
                faulthandler.dump_traceback_later(moment - time.monotonic() + 4, exit=True, file=2)
                armed = True
            elif armed:
                faulthandler.cancel_dump_traceback_later()
                armed = False
        if armed:
            faulthandler.cancel_dump_traceback_later()


def connection_lost(error: BaseException) -> bool:
    """Whether a rank has left, or did not answer, while this one was in a collective."""
    if not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return False
    inside = any(reporting.is_collective(frame) for frame, _ in traceback.walk_tb(error.__traceback__))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return inside or "DistError" in kinds or "gloo/transport" in str(error)  # the last: one begun before, waited for


def newest_verdict(folder: Path, since: float) -> str | None:
    """The last verdict in a run folder, if it was written after the Unix time `since`."""
    found = [(path.stat().st_mtime, path) for path in (folder / FOLDER).glob(f"step-*/{VERDICT_FILE}")]
    if not found or max(found)[0] < since:
        return None
    return max(found)[1].read_text().strip()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
