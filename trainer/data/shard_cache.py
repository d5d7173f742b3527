"""Shards by name: opened as local files that hold the bytes the manifest was written for.

A shard of a local folder is its own file. One that lies elsewhere is copied into a folder which all processes of
a node share. The one idea: a copy is named by the hash of its content, so it can be torn, removed and made again
at any moment but never be mistaken for another; two runs share it, and a corpus that changes has other copies.
Copies are made under a temporary name that its maker holds a lock on. The lock ends with its process, so a crash
leaves nothing that blocks, and of the ranks that want one shard one fetches it. A shard is *damaged* where its
place answers and has not its bytes; a place that does not answer says nothing of the shard, and stops the run.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import FILE, DamagedShard, Shard, check_bytes
from tandem.trainer.data.memory_maps import Maps
from tandem.trainer.data.shard_download import fetched
from tandem.trainer.disk import sync_folder
from tandem.trainer.runtime import node_ranks

COPY, PART, LOCK = ".tar", ".part", ".lock"
AHEAD_THREADS = 2
POLL_SECONDS = 0.05
MAPPED_COPIES = 128
"""Most copies that a process keeps mapped: each takes a file descriptor, of which it may have a thousand or so."""
MAPPED_FRACTION = 1 / 4
"""Of the room: what the processes of a node may keep mapped of copies, which stays on disk when a copy is removed."""

log = logging.getLogger(__name__)


class Cache:
    """Its methods may be called by several threads; its folder may be used by several processes."""

    def __init__(self, settings: config.Cache):
        self._settings = settings
        self._folder = Path(settings.folder).expanduser()
        self._room_bytes = int(settings.gib * 2**30)
        self._good: dict[str, tuple[int, int, int]] = {}
        """The files whose bytes this process has hashed, see `_state`."""
        self._damaged: dict[str, str] = {}
        """What `opened` has said of the shards at these addresses."""
        self._lock = threading.Lock()
        self._busy: dict[str, Future[None]] = {}
        self._wanted: dict[str, tuple[str, Shard]] = {}
        self._num_ahead = 0
        # Of all sources together, so that what is mapped and no longer named does not grow with their number.
        self.maps = Maps(MAPPED_COPIES, int(self._room_bytes * MAPPED_FRACTION / node_ranks()))
        """Of copies; what lies in a local folder takes no room here."""

    def opened(self, folder: str | Path, shard: Shard) -> BinaryIO:
        """The open file of a shard, its bytes hashed; it lives as long as it is open or mapped.

        Bytes are hashed once per process, and again where the file is another one, has another size or, in a local
        folder, another time of change. A file that is truncated while it is mapped ends the process with SIGBUS.
        Raises: DamagedShard where it is missing, truncated or altered, from then on without another look: one that
        comes back is seen by the next launch. UserError where it cannot be reached, or there is no room.
        """
        address = remote_files.below(folder, shard.file)
        if said := self._damaged.get(address):
            raise DamagedShard(shard.file, said)
        try:
            return self._opened(folder, shard)
        except DamagedShard as error:
            self._damaged[address] = str(error)
            raise

    def _opened(self, folder: str | Path, shard: Shard) -> BinaryIO:
        address = remote_files.below(folder, shard.file)
        with self._alone(address):
            return (
                self._copy(folder, shard)
                if remote_files.is_remote(folder)
                else self._local(Path(address), shard, folder)
            )

    def soon(self, folder: str | Path, shard: Shard) -> None:
        """Returns at once; the shard is fetched and hashed in the background. What fails is logged: `opened` tries again.

        Copies that wait for that take up to half of the room, lest they push out each other.
        """
        address = remote_files.below(folder, shard.file)
        name = self._name(shard) if remote_files.is_remote(folder) else address
        with self._lock:
            is_there = str(name) in self._good and Path(name).exists()
            if is_there or any(address in known for known in (self._wanted, self._busy, self._damaged)):
                return
            waiting_bytes = sum(wanted.bytes for _, wanted in self._wanted.values())
            if remote_files.is_remote(folder) and 2 * (waiting_bytes + shard.bytes) > self._room_bytes:
                return
            self._wanted[address] = (str(folder), shard)
            if self._num_ahead < AHEAD_THREADS:
                self._num_ahead += 1
                threading.Thread(target=self._fetch_ahead, name="shards-ahead", daemon=True).start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._num_ahead -= 1
                    return
                address = next(iter(self._wanted))
                folder, shard = self._wanted.pop(address)
            try:
                self._opened(folder, shard).close()
            except UserError as error:
                log.warning("%s; this was ahead of need: the reader of the shard tries again", error)

    @contextmanager
    def _alone(self, address: str) -> Iterator[None]:
        """One thread at a time for a shard. The others wait: they need not hash it again, and share its failure."""
        mine: Future[None] = Future()
        while True:
            with self._lock:
                self._wanted.pop(address, None)
                now = self._busy.setdefault(address, mine)
            if now is mine:
                break
            now.result()
        try:
            yield
        except BaseException as error:
            self._busy.pop(address)
            mine.set_exception(error)
            raise
        self._busy.pop(address)
        mine.set_result(None)

    def _local(self, path: Path, shard: Shard, folder: str | Path) -> io.BufferedReader:
        try:
            return self._checked(path, shard)
        except FileNotFoundError:
            if not (Path(folder) / FILE).exists():
                raise UserError(
                    f"{folder}: has no {FILE} any more; restore the folder, or what is mounted there"
                ) from None
            raise DamagedShard(
                shard.file, f"{path}: shard is missing; the manifest lists it; restore it or prepare the corpus again"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path}: shard cannot be read ({error.strerror or error}); restore the way to it"
            ) from None

    def _checked(self, path: Path, shard: Shard, *, is_copy: bool = False) -> io.BufferedReader:
        with ExitStack() as on_error:
            file = on_error.enter_context(path.open("rb"))
            state = _state(file, is_copy=is_copy)
            if self._good.get(str(path)) != state:
                # Once for each shard, rank and launch.
                check_bytes(file, path, shard)
                file.seek(0)
            self._good[str(path)] = state
            on_error.pop_all()
        return file

    def _name(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}{COPY}"

    def _copy(self, folder: str | Path, shard: Shard) -> io.BufferedReader:
        copy = self._name(shard)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (file := self._present(copy, shard)) is None:
                self._make(folder, shard, copy)
            # When it was last used, by the clock of the process: the kernel's own stamps are the same for some milliseconds,
            # and the time of access is not kept on every disk.
            now_ns = time.time_ns()
            with suppress(PermissionError):  # of another user
                os.utime(file.fileno(), ns=(now_ns, now_ns))
            return file
        except OSError as error:
            raise UserError(
                f"data.cache.folder: {self._folder}: {error.strerror or error}; must be a local folder with room for copies "
                "of shards that this user may read; mend that, lower data.cache.gib, or name another folder"
            ) from None

    def _present(self, copy: Path, shard: Shard) -> io.BufferedReader | None:
        """The copy, open; None where there is none, or there was one that the disk has altered."""
        try:
            return self._checked(copy, shard, is_copy=True)
        except FileNotFoundError:
            return None
        except (DamagedShard, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise  # of this process: the copy may be good, and others use it
            log.warning("%s; it is fetched again", error)
            copy.unlink(missing_ok=True)
            return None

    def _make(self, folder: str | Path, shard: Shard, copy: Path) -> None:
        """There was a copy a moment ago, by this process or by the one that this waited for."""
        part = copy.with_suffix(PART)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_file(part, file):
                return
            try:
                if not copy.exists():
                    self._reserve(file, shard)
                    fetched(folder, shard, file, self._settings)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._room():
                        part.rename(copy)
                    sync_folder(self._folder)
                    self._good[str(copy)] = _state(file, is_copy=True)
            finally:
                if _is_file(part, file):
                    part.unlink()

    def _reserve(self, part: BinaryIO, shard: Shard) -> None:
        """There is room for the shard and the part has it: copies not used for longest are gone.

        Waits while others that are being fetched leave no room. Raises: UserError where there can be none.
        """
        if shard.bytes > self._room_bytes:
            raise UserError(
                f"data.cache.gib: {self._settings.gib}; shard {shard.file} has {shard.bytes} bytes; "
                "must be room for several shards; raise it"
            )
        while True:
            with self._room():
                if self._evict(shard.bytes):
                    os.posix_fallocate(part.fileno(), 0, shard.bytes)
                    return
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """One process at a time counts and changes what is in the folder."""
        with (self._folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _evict(self, wanted_bytes: int) -> bool:
        """Whether that many bytes fit, after removing as many copies as it takes."""
        copies, taken_bytes = [], wanted_bytes
        for path in self._folder.iterdir():
            if path.suffix not in (COPY, PART) or (path.suffix == PART and _abandoned(path)):
                continue
            with suppress(FileNotFoundError):  # a failed part, or a bad copy, that its process has removed
                facts = path.stat()
                taken_bytes += facts.st_size
                if path.suffix == COPY:
                    copies.append((facts.st_mtime_ns, facts.st_size, path))
        for _, size_bytes, path in sorted(copies):
            if taken_bytes <= self._room_bytes:
                break
            path.unlink(missing_ok=True)
            self._good.pop(str(path), None)
            taken_bytes -= size_bytes
        return taken_bytes <= self._room_bytes


def _state(file: BinaryIO, *, is_copy: bool) -> tuple[int, int, int]:
    """What is another where the file is: inode, size, and time of change, which of a copy is when it was last used."""
    facts = os.fstat(file.fileno())
    return facts.st_ino, facts.st_size, 0 if is_copy else facts.st_mtime_ns


def _is_file(path: Path, file: BinaryIO) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Whether nobody makes this part any more; if so it is gone after the call."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(part, file):
                part.unlink()
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
