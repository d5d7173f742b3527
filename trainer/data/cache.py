"""Shards by name: opened as local files that hold the bytes the manifest was written for.

A shard of a local folder is its own file. One that lies elsewhere is copied into a folder which all processes of
a node share. The one idea: a copy is named by the hash of its content, so it can be torn, removed and made again
at any moment but never be mistaken for another; two runs share it, and a corpus that changes has other copies.
Copies are made under a temporary name that its maker holds a lock on. The lock ends with its process, so a crash
leaves nothing that blocks, and of the ranks that want one shard one fetches it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from trainer import config
from trainer.config import UserError
from trainer.data import remote
from trainer.data.manifest import DamagedShard, Shard, check_bytes

COPY, PART, LOCK = ".tar", ".part", ".lock"
AHEAD_THREADS = 2
POLL_SECONDS = 0.05
SLOW_SECONDS = 60.0
"""How often a fetch that goes on for long says how far it is."""

log = logging.getLogger(__name__)


class Cache:
    """Its methods may be called by several threads; its folder may be used by several processes."""

    def __init__(self, settings: config.Cache):
        self._settings = settings
        self._folder = Path(settings.folder).expanduser()
        self._room_bytes = int(settings.gib * 2**30)
        self._good: dict[str, int] = {}
        """Inodes of the files whose bytes this process has hashed."""
        self._change = threading.Condition()
        self._busy: set[str] = set()
        self._wanted: dict[str, tuple[str, Shard]] = {}
        self._failed: dict[str, BaseException] = {}
        self._num_ahead = 0

    def path(self, folder: str | Path, shard: Shard) -> Path:
        """The file of a shard, as `opened`. Note: a copy may be removed from its name before it is opened."""
        with self.opened(folder, shard) as file:
            return Path(file.name)

    def opened(self, folder: str | Path, shard: Shard) -> BinaryIO:
        """The open file of a shard, its bytes hashed once per process; it lives as long as it is open or mapped.

        Raises: DamagedShard where it is missing, altered or cannot be fetched; UserError where there is no room.
        """
        address = remote.below(folder, shard.file)
        with self._alone(address):
            if error := self._failed.pop(address, None):
                raise error
            return self._copy(address, shard) if remote.is_remote(folder) else self._checked(Path(address), shard)

    def soon(self, folder: str | Path, shard: Shard) -> None:
        """Returns at once; the shard is fetched and hashed in the background, what fails is raised by `opened`.

        Copies that wait for that take up to half of the room, lest they push out each other.
        """
        address = remote.below(folder, shard.file)
        name = self._name(shard) if remote.is_remote(folder) else address
        with self._change:
            is_there = str(name) in self._good and Path(name).exists()
            if is_there or any(address in known for known in (self._wanted, self._busy, self._failed)):
                return
            waiting_bytes = sum(wanted.bytes for _, wanted in self._wanted.values())
            if remote.is_remote(folder) and 2 * (waiting_bytes + shard.bytes) > self._room_bytes:
                return
            self._wanted[address] = (str(folder), shard)
            if self._num_ahead < AHEAD_THREADS:
                self._num_ahead += 1
                threading.Thread(target=self._fetch_ahead, name="shards-ahead", daemon=True).start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._change:
                if not self._wanted:
                    self._num_ahead -= 1
                    return
                address = next(iter(self._wanted))
                folder, shard = self._wanted.pop(address)
            try:
                self.opened(folder, shard).close()
            except BaseException as error:  # handed over whole: the reader of the shard raises it
                self._failed[address] = error

    @contextmanager
    def _alone(self, address: str) -> Iterator[None]:
        """One thread at a time for a shard: the others need not hash it, or hear of its failure, again."""
        with self._change:
            self._wanted.pop(address, None)
            self._change.wait_for(lambda: address not in self._busy)
            self._busy.add(address)
        try:
            yield
        finally:
            with self._change:
                self._busy.remove(address)
                self._change.notify_all()

    def _checked(self, path: Path, shard: Shard) -> io.BufferedReader:
        with ExitStack() as on_error:
            try:
                file = on_error.enter_context(path.open("rb"))
                inode = os.fstat(file.fileno()).st_ino
                if self._good.get(str(path)) != inode:
                    # Once for each shard, rank and launch.
                    check_bytes(file, path, shard)
                    file.seek(0)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                reason = "shard is missing" if missing else f"shard cannot be read ({error.strerror})"
                raise DamagedShard(
                    shard.file, f"{path}: {reason}; the manifest lists it; restore it or prepare the corpus again"
                ) from None
            self._good[str(path)] = inode
            on_error.pop_all()
        return file

    def _name(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}{COPY}"

    def _copy(self, address: str, shard: Shard) -> io.BufferedReader:
        copy = self._name(shard)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (file := self._present(copy, shard)) is None:
                self._make(address, shard, copy)
            os.utime(file.fileno())  # when it was last used; the time of access is not kept on every disk
            return file
        except OSError as error:
            raise UserError(
                f"data.cache.folder: {self._folder}: {error.strerror or error}; must be a local folder with room for copies "
                "of shards; free some, lower data.cache.gib, or name another folder"
            ) from None

    def _present(self, copy: Path, shard: Shard) -> io.BufferedReader | None:
        """The copy, open; None where there is none, or there was one that the disk has altered."""
        if not copy.exists():
            return None
        try:
            return self._checked(copy, shard)
        except DamagedShard as error:
            if copy.exists():
                log.warning("%s; it is fetched again", error)
                copy.unlink(missing_ok=True)
            return None

    def _make(self, address: str, shard: Shard, copy: Path) -> None:
        """There was a copy a moment ago, by this process or by the one that this waited for."""
        part = copy.with_suffix(PART)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_file(part, file):
                return
            try:
                if not copy.exists():
                    self._reserve(file, shard)
                    self._fetch(address, shard, file)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._room():
                        part.rename(copy)
                    _sync(self._folder)
                    self._good[str(copy)] = os.fstat(file.fileno()).st_ino
            finally:
                if _is_file(part, file):
                    part.unlink()

    def _fetch(self, address: str, shard: Shard, part: BinaryIO) -> None:
        settings = self._settings
        patience = remote.Patience(address, settings.attempts, settings.timeout_seconds, (remote.Missing,))
        fetch, wrong = _Fetch(address, shard, part), ""
        while True:
            try:
                fetch.go_on(settings.timeout_seconds)
                found = fetch.digest.hexdigest()
                if found == shard.sha256:
                    return
                fetch.start_over()
                reason = f"sha256 {found[:12]}; the manifest says {shard.sha256[:12]}"
                if found == wrong:
                    raise _hopeless(address, shard, patience.failures + 1, f"{reason}, twice the same")
                wrong = found
                raise remote.Unreachable(reason)
            except remote.Unreachable as error:
                try:
                    patience.failed(error)
                except remote.Unreachable:
                    raise _hopeless(address, shard, patience.failures, str(error)) from None

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


class _Fetch:
    """What of a shard has come, and its hash; a try goes on where the one before it broke."""

    def __init__(self, address: str, shard: Shard, part: BinaryIO):
        self._address, self._shard, self._part = address, shard, part
        self.start_over()

    def start_over(self) -> None:
        self._part.seek(0)
        self._done_bytes, self.digest = 0, hashlib.sha256()

    def go_on(self, timeout_seconds: float) -> None:
        """The part holds as many bytes as the shard. Raises: remote.Unreachable."""
        said, size_bytes = time.monotonic(), self._shard.bytes
        with closing(remote.blocks(self._address, self._done_bytes, timeout_seconds)) as blocks:
            for block in blocks:
                if self._done_bytes + len(block) > size_bytes:
                    self.start_over()
                    raise remote.Unreachable(f"longer than the {size_bytes} bytes that the manifest says")
                self._part.write(block)
                self.digest.update(block)
                self._done_bytes += len(block)
                if time.monotonic() - said > SLOW_SECONDS:
                    said = time.monotonic()
                    log.warning("%s: slow: %d of %d bytes so far", self._address, self._done_bytes, size_bytes)
        if self._done_bytes < size_bytes:
            raise remote.Unreachable(f"ended at byte {self._done_bytes} of {size_bytes}")


def _hopeless(address: str, shard: Shard, tries: int, reason: str) -> DamagedShard:
    return DamagedShard(
        shard.file,
        f"{address}: shard cannot be fetched; tries: {tries}, the last: {reason}; restore it, or the way to it",
    )


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


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
