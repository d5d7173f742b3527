"""Every call of a save that changes what is on disk, named and counted; and a kill before, in the middle of or after one.

Installed in a rank that the sweep has started, around Python's own functions: the trainer's code runs as it stands. A call is
named after what it does to which part of a save ("write data 17", "replace marker 1"), so that the same moment is found
again in another run. Names begin with "old" for an earlier checkpoint, with "torn" for one that a kill has left.
"""

import builtins
import io
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_PATH = re.compile(r"/checkpoints(?:/step-(\d+)(?:/(.+))?)?$")
FILE_ROLES = {"rank-": "data", "manifest.json.": "manifest", "manifest.json": "manifest", "COMMITTED": "marker"}
LEDGER_FILE = "ledger.jsonl"
KILL_ENTRY = "killed"
"""The last word of a log, where the kill has come."""


@dataclass(frozen=True)
class CallPoint:
    """A moment of a save."""

    rank: int
    call: str
    moment: str
    """before, half (of a write) or after."""


@dataclass(frozen=True)
class Kill:
    """At the point, in the first save from the `first_save`-th of the process on that comes to it."""

    point: CallPoint
    first_save: int
    victim_ranks: tuple[int, ...]


class SaveTracer:
    """The calls of this rank's saves from here on; each is written to `log`, and the kill, if there is one, done."""

    def __init__(self, folder: Path, rank: int, log: Path, kill: Kill | None, pid_of: Callable[[int], int]) -> None:
        self._folder, self._rank, self._kill, self._pid_of = str(folder), rank, kill, pid_of
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._step, self._num_saves = -1, 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._os_functions = {name: getattr(os, name) for name in ("mkdir", "replace", "unlink", "rmdir", "fsync")}

    def install(self) -> None:
        """Python's functions go through here."""
        real = self._os_functions

        def mkdir(path: Any, *args: Any, **named: Any) -> None:
            self._trace_call("mkdir", path, lambda: real["mkdir"](path, *args, **named))

        def replace(path: Any, target: Any, **named: Any) -> None:
            self._trace_call("replace", target, lambda: real["replace"](path, target, **named))

        def unlink(path: Any, *, dir_fd: int | None = None) -> None:
            self._trace_call("unlink", _resolve_path(path, dir_fd), lambda: real["unlink"](path, dir_fd=dir_fd))

        def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
            self._trace_call("rmdir", _resolve_path(path, dir_fd), lambda: real["rmdir"](path, dir_fd=dir_fd))

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self._trace_call("fsync", os.readlink(f"/proc/self/fd/{number}"), lambda: real["fsync"](file))

        os.mkdir, os.replace, os.unlink, os.rmdir, os.fsync = mkdir, replace, unlink, rmdir, fsync  # type: ignore[assignment]
        plain = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
            if mode in ("wb", "xb") and not isinstance(file, int) and self._classify_path(file):
                raw: list[Any] = []
                self._trace_call("open", file, lambda: raw.append(_TracedFile(self, os.fspath(file), mode)))
                return io.BufferedWriter(raw[0])
            return plain(file, mode, *args, **named)

        builtins.open = io.open = opened  # type: ignore[assignment]

    def write(self, path: str, data: Any, write: Callable[[Any], int | None]) -> int | None:
        """One write that reaches the file system; where the kill is in its middle, half of it does, and if this rank is not the
        one that is killed the rest follows.
        """
        found: list[int | None] = []
        whole = memoryview(data).cast("B")
        middle = whole.nbytes // 2

        def in_halves() -> None:
            write(whole[:middle])
            self._kill_victims()
            write(whole[middle:])
            found.append(whole.nbytes)

        self._trace_call("write", path, lambda: found.append(write(data)), in_halves)
        return found[0]

    def _trace_call(
        self, verb: str, path: Any, call: Callable[[], object], half: Callable[[], object] | None = None
    ) -> None:
        part = self._classify_path(path)
        if part is None:
            call()
            return
        with self._lock:
            name = self._name_call(verb, os.fspath(path), part)
            self._kill_at(name, "before")
            if half and self._is_kill_point(name, "half"):
                half()
            else:
                call()
            os.write(self._log, f"{self._rank} {self._step} {self._num_saves} {name}\n".encode())
            self._kill_at(name, "after")

    def _name_call(self, verb: str, path: str, part: tuple[int | None, str]) -> str:
        step, role = part
        if step is not None and (verb, role) in (("mkdir", "folder"), ("open", "data")) and step != self._step:
            self._step, self._num_saves = step, self._num_saves + 1
            self._counts.clear()
        age = "" if step in (None, self._step) else "old " if step < self._step else "torn "
        words = f"{verb} {age}{role}"
        self._counts[words] += 1
        return f"{words} {self._counts[words]}"

    def _classify_path(self, path: Any) -> tuple[int | None, str] | None:
        """The step and what it is of its checkpoint; None for what is no part of a save."""
        text = os.path.abspath(os.fspath(path)) if not isinstance(path, int) else ""
        if not text.startswith(self._folder):
            return None
        if text.endswith(LEDGER_FILE):
            return (None, "ledger") if threading.current_thread().name == "checkpoint" else None
        found = STEP_PATH.search(text)
        if not found:
            return None
        step, file = found.groups()
        if step is None:
            return None, "root"
        if file is None:
            return int(step), "folder"
        return int(step), next((role for prefix, role in FILE_ROLES.items() if file.startswith(prefix)), "other")

    def _is_kill_point(self, name: str, when: str) -> bool:
        kill = self._kill
        return (
            kill is not None and kill.first_save <= self._num_saves and kill.point == CallPoint(self._rank, name, when)
        )

    def _kill_at(self, name: str, when: str) -> None:
        if self._is_kill_point(name, when):
            self._kill_victims()

    def _kill_victims(self) -> None:
        assert self._kill is not None
        others = [rank for rank in self._kill.victim_ranks if rank != self._rank]
        os.write(self._log, f"{self._rank} {self._step} {self._num_saves} {KILL_ENTRY}\n".encode())
        for rank in others:
            os.kill(self._pid_of(rank), signal.SIGKILL)
        if self._rank in self._kill.victim_ranks:
            os.kill(os.getpid(), signal.SIGKILL)
        self._kill = None


class _TracedFile(io.FileIO):
    """A file whose every write is seen, below Python's buffer."""

    def __init__(self, tap: SaveTracer, path: str, mode: str) -> None:
        super().__init__(path, mode[0])
        self._tracer, self._path = tap, path

    def write(self, data: Any) -> int | None:
        return self._tracer.write(self._path, data, super().write)


def _resolve_path(path: Any, dir_fd: int | None) -> str:
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else os.fspath(path)
