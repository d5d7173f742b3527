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
from tandem.trainer.data.manifest import MANIFEST_FILE, DamagedShard, Shard, check_shard_content
from tandem.trainer.data.memory_maps import MemoryMaps
from tandem.trainer.data.shard_download import fetch_shard
from tandem.trainer.disk import sync_folder
from tandem.trainer.runtime import max_local_world_size

COPY_SUFFIX, PARTIAL_SUFFIX, LOCK_FILE = ".tar", ".part", ".lock"
MAX_PREFETCH_THREADS = 2
ROOM_POLL_SECONDS = 0.05
MAX_MAPPED_COPIES = 128
"""Most copies that a process keeps mapped: each takes a file descriptor, of which it may have a thousand or so."""
MAX_MAPPED_FRACTION = 1 / 4
"""Of the room: what the processes of a node may keep mapped of copies, which stays on disk when a copy is removed."""

log = logging.getLogger(__name__)


class ShardCache:
    """Its methods may be called by several threads; its folder may be used by several processes."""

    def __init__(self, settings: config.ShardCacheConfig):
        self._settings = settings
        self._folder = Path(settings.folder).expanduser()
        self._max_size_bytes = int(settings.max_size_gib * 2**30)
        self._verified_states: dict[str, tuple[int, int, int]] = {}
        """The files whose bytes this process has hashed, see `_file_state`."""
        self._damage_messages: dict[str, str] = {}
        """What `open_shard` has said of the shards at these addresses."""
        self._lock = threading.Lock()
        self._shards_in_progress: dict[str, Future[None]] = {}
        self._prefetch_queue: dict[str, tuple[str, Shard]] = {}
        self._num_prefetch_threads = 0
        # Of all sources together, so that what is mapped and no longer named does not grow with their number.
        self.memory_maps = MemoryMaps(
            MAX_MAPPED_COPIES, int(self._max_size_bytes * MAX_MAPPED_FRACTION / max_local_world_size())
        )
        """Of copies; what lies in a local folder takes no room here."""

    def open_shard(self, folder: str | Path, shard: Shard) -> BinaryIO:
        """The open file of a shard, its bytes hashed; it lives as long as it is open or mapped.

        Bytes are hashed once per process, and again where the file is another one, has another size or, in a local
        folder, another time of change. A file that is truncated while it is mapped ends the process with SIGBUS.
        Raises: DamagedShard where it is missing, truncated or altered, from then on without another look: one that
        comes back is seen by the next launch. UserError where it cannot be reached, or there is no room.
        """
        address = remote_files.join_address(folder, shard.file)
        if message := self._damage_messages.get(address):
            raise DamagedShard(shard.file, message)
        try:
            return self._open_shard(folder, shard)
        except DamagedShard as error:
            self._damage_messages[address] = str(error)
            raise

    def _open_shard(self, folder: str | Path, shard: Shard) -> BinaryIO:
        address = remote_files.join_address(folder, shard.file)
        with self._exclusive_access(address):
            return (
                self._open_copy(folder, shard)
                if remote_files.is_remote(folder)
                else self._open_local(Path(address), shard, folder)
            )

    def prefetch(self, folder: str | Path, shard: Shard) -> None:
        """Returns at once; the shard is fetched and hashed in the background. What fails is logged: `open_shard` tries again.

        Copies that wait for that take up to half of the room, lest they push out each other.
        """
        address = remote_files.join_address(folder, shard.file)
        local_path = self._copy_path(shard) if remote_files.is_remote(folder) else address
        with self._lock:
            is_present = str(local_path) in self._verified_states and Path(local_path).exists()
            if is_present or any(
                address in known for known in (self._prefetch_queue, self._shards_in_progress, self._damage_messages)
            ):
                return
            waiting_bytes = sum(queued_shard.bytes for _, queued_shard in self._prefetch_queue.values())
            if remote_files.is_remote(folder) and 2 * (waiting_bytes + shard.bytes) > self._max_size_bytes:
                return
            self._prefetch_queue[address] = (str(folder), shard)
            if self._num_prefetch_threads < MAX_PREFETCH_THREADS:
                self._num_prefetch_threads += 1
                threading.Thread(target=self._run_prefetch, name="shards-ahead", daemon=True).start()

    def _run_prefetch(self) -> None:
        while True:
            with self._lock:
                if not self._prefetch_queue:
                    self._num_prefetch_threads -= 1
                    return
                address = next(iter(self._prefetch_queue))
                folder, shard = self._prefetch_queue.pop(address)
            try:
                self._open_shard(folder, shard).close()
            except UserError as error:
                log.warning("%s; this was ahead of need: the reader of the shard tries again", error)

    @contextmanager
    def _exclusive_access(self, address: str) -> Iterator[None]:
        """One thread at a time for a shard. The others wait: they need not hash it again, and share its failure."""
        own_future: Future[None] = Future()
        while True:
            with self._lock:
                self._prefetch_queue.pop(address, None)
                current_future = self._shards_in_progress.setdefault(address, own_future)
            if current_future is own_future:
                break
            current_future.result()
        try:
            yield
        except BaseException as error:
            self._shards_in_progress.pop(address)
            own_future.set_exception(error)
            raise
        self._shards_in_progress.pop(address)
        own_future.set_result(None)

    def _open_local(self, path: Path, shard: Shard, folder: str | Path) -> io.BufferedReader:
        try:
            return self._open_verified(path, shard)
        except FileNotFoundError:
            if not (Path(folder) / MANIFEST_FILE).exists():
                raise UserError(
                    f"{folder}: has no {MANIFEST_FILE} any more; restore the folder, or what is mounted there"
                ) from None
            raise DamagedShard(
                shard.file, f"{path}: shard is missing; the manifest lists it; restore it or prepare the corpus again"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path}: shard cannot be read ({error.strerror or error}); restore the way to it"
            ) from None

    def _open_verified(self, path: Path, shard: Shard, *, is_copy: bool = False) -> io.BufferedReader:
        with ExitStack() as on_error:
            file = on_error.enter_context(path.open("rb"))
            state = _file_state(file, is_copy=is_copy)
            if self._verified_states.get(str(path)) != state:
                # Once for each shard, rank and launch.
                check_shard_content(file, path, shard)
                file.seek(0)
            self._verified_states[str(path)] = state
            on_error.pop_all()
        return file

    def _copy_path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}{COPY_SUFFIX}"

    def _open_copy(self, folder: str | Path, shard: Shard) -> io.BufferedReader:
        copy = self._copy_path(shard)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while (file := self._open_existing_copy(copy, shard)) is None:
                self._fetch_copy(folder, shard, copy)
            # When it was last used, by the clock of the process: the kernel's own stamps are the same for some milliseconds,
            # and the time of access is not kept on every disk.
            now_ns = time.time_ns()
            with suppress(PermissionError):  # of another user
                os.utime(file.fileno(), ns=(now_ns, now_ns))
            return file
        except OSError as error:
            raise UserError(
                f"data.cache.folder: {self._folder}: {error.strerror or error}; must be a local folder with room for copies "
                "of shards that this user may read; mend that, lower data.cache.max_size_gib, or name another folder"
            ) from None

    def _open_existing_copy(self, copy: Path, shard: Shard) -> io.BufferedReader | None:
        """The copy, open; None where there is none, or there was one that the disk has altered."""
        try:
            return self._open_verified(copy, shard, is_copy=True)
        except FileNotFoundError:
            return None
        except (DamagedShard, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise  # of this process: the copy may be good, and others use it
            log.warning("%s; it is fetched again", error)
            copy.unlink(missing_ok=True)
            return None

    def _fetch_copy(self, folder: str | Path, shard: Shard, copy: Path) -> None:
        """There was a copy a moment ago, by this process or by the one that this waited for."""
        partial_path = copy.with_suffix(PARTIAL_SUFFIX)
        with os.fdopen(os.open(partial_path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(partial_path, file):
                return
            try:
                if not copy.exists():
                    self._reserve_space(file, shard)
                    fetch_shard(folder, shard, file, self._settings)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._folder_lock():
                        partial_path.rename(copy)
                    sync_folder(self._folder)
                    self._verified_states[str(copy)] = _file_state(file, is_copy=True)
            finally:
                if _is_same_file(partial_path, file):
                    partial_path.unlink()

    def _reserve_space(self, partial_file: BinaryIO, shard: Shard) -> None:
        """There is room for the shard and the part has it: copies not used for longest are gone.

        Waits while others that are being fetched leave no room. Raises: UserError where there can be none.
        """
        if shard.bytes > self._max_size_bytes:
            raise UserError(
                f"data.cache.max_size_gib: {self._settings.max_size_gib}; shard {shard.file} has {shard.bytes} bytes; "
                "must be room for several shards; raise it"
            )
        while True:
            with self._folder_lock():
                if self._evict(shard.bytes):
                    os.posix_fallocate(partial_file.fileno(), 0, shard.bytes)
                    return
            time.sleep(ROOM_POLL_SECONDS)

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """One process at a time counts and changes what is in the folder."""
        with (self._folder / LOCK_FILE).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _evict(self, needed_bytes: int) -> bool:
        """Whether that many bytes fit, after removing as many copies as it takes."""
        copies, used_bytes = [], needed_bytes
        for path in self._folder.iterdir():
            if path.suffix not in (COPY_SUFFIX, PARTIAL_SUFFIX) or (
                path.suffix == PARTIAL_SUFFIX and _remove_if_abandoned(path)
            ):
                continue
            with suppress(FileNotFoundError):  # a failed part, or a bad copy, that its process has removed
                status = path.stat()
                used_bytes += status.st_size
                if path.suffix == COPY_SUFFIX:
                    copies.append((status.st_mtime_ns, status.st_size, path))
        for _, size_bytes, path in sorted(copies):
            if used_bytes <= self._max_size_bytes:
                break
            path.unlink(missing_ok=True)
            self._verified_states.pop(str(path), None)
            used_bytes -= size_bytes
        return used_bytes <= self._max_size_bytes


def _file_state(file: BinaryIO, *, is_copy: bool) -> tuple[int, int, int]:
    """What is another where the file is: inode, size, and time of change, which of a copy is when it was last used."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, 0 if is_copy else status.st_mtime_ns


def _is_same_file(path: Path, file: BinaryIO) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(partial_path: Path) -> bool:
    """Whether nobody makes this part any more; if so it is gone after the call."""
    try:
        with partial_path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(partial_path, file):
                partial_path.unlink()
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
