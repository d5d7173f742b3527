"""Opens shards as local files with verified content, and caches copies of remote shards.

A shard in a local folder is opened in place. A remote shard is copied into a folder that all processes of a user on a node
share. Other users cannot write in it. A copy is named by the hash of its content, so it is never mistaken for another, two runs
can share it, and a changed corpus gets new copies. Copies are written under a temporary name that the writer locks. A lock ends
with its process, so a crash blocks no other process, and only one of the ranks that need a shard fetches it.

A shard is *damaged* if its folder or server responds but does not have the right bytes. If the server does not respond, the
state of the shard is unknown, and the run stops.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tandem.trainer import config
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import open_regular_file
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import MANIFEST_FILE, DamagedShard, Shard, check_shard_content, missing_shard
from tandem.trainer.data.shard_download import fetch_shard
from tandem.trainer.disk import sync_folder
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.runtime.private_folder import open_private_file, private_folder

if TYPE_CHECKING:
    import numpy as np

COPY_SUFFIX, PARTIAL_SUFFIX, LOCK_FILE = ".tar", ".part", ".lock"
CACHE_FILE_PATTERN = re.compile(rf"[0-9a-f]{{64}}(\{COPY_SUFFIX}|\{PARTIAL_SUFFIX})")
MAX_PREFETCH_THREADS = 2
ROOM_POLL_SECONDS = 0.05
MAX_MAPPED_COPIES = 128
"""Maximum number of copies that a process keeps mapped. Each uses a file descriptor, often limited to about 1,000."""
MAX_MAPPED_FRACTION = 1 / 4
"""Share of the cache's size that a node's processes may keep mapped. Mapped bytes stay on disk after a copy is removed."""

log = logging.getLogger(__name__)


class MemoryMaps:
    """Keeps up to `max_maps` maps of up to `max_bytes` in total, and always the newest one."""

    def __init__(self, max_maps: int, max_bytes: int = sys.maxsize):
        self._max_maps, self._max_bytes = max_maps, max_bytes
        self._maps: dict[tuple[str, str], np.ndarray] = {}
        self._lock = threading.Lock()

    def find(self, folder: str, file: str) -> np.ndarray | None:
        return self._maps.get((folder, file))

    def add(self, folder: str, file: str, array: np.ndarray) -> None:
        """Keep the map, and drop old ones over a limit. A dropped map closes when the last array that uses it is freed."""
        with self._lock:
            self._maps[folder, file] = array
            kept_bytes = sum(mapped.nbytes for mapped in self._maps.values())
            while len(self._maps) > 1 and (len(self._maps) > self._max_maps or kept_bytes > self._max_bytes):
                kept_bytes -= self._maps.pop(next(iter(self._maps))).nbytes


class ShardCache:
    """Opens verified shards. It is thread-safe, and several processes can share its folder."""

    def __init__(self, settings: config.ShardCacheConfig):
        self._settings = settings
        self._folder = Path(settings.folder).expanduser()
        self._max_size_bytes = int(settings.max_size_gib * 2**30)
        self._verified_states: dict[str, tuple[int, int, int]] = {}
        """State of each file that this process has hashed, see `_file_state`."""
        self._damage_messages: dict[str, str] = {}
        """Error message of each damaged shard, by address."""
        self._lock = threading.Lock()
        self._shards_in_progress: dict[str, Future[None]] = {}
        self._prefetch_queue: dict[str, tuple[str, Shard]] = {}
        self._num_prefetch_threads = 0
        # Shared by all sources, so that the mapped bytes of removed copies do not grow with the number of sources.
        max_mapped_bytes = int(self._max_size_bytes * MAX_MAPPED_FRACTION / current_launch().local_world_size)
        self.memory_maps = MemoryMaps(MAX_MAPPED_COPIES, max_mapped_bytes)
        """Maps of copies. Shards in local folders are not included, because they do not use the cache's space."""

    def open_shard(self, folder: str | Path, shard: Shard) -> BinaryIO:
        """Open a shard and verify its hash. The content stays available as long as the file is open or mapped.

        A process hashes each file once, and again if the inode, the size or the modification time changes.
        If a file is truncated while it is mapped, the process dies with SIGBUS.
        Raises: DamagedShard if the shard is missing, truncated or altered. Later calls raise it without checking again, so only
        the next launch sees a restored shard. UserError if the shard cannot be reached or the cache has no space.
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
            if remote_files.is_remote(folder):
                return self._open_copy(folder, shard)
            return self._open_local(Path(address), shard, folder)

    def prefetch(self, folder: str | Path, shard: Shard) -> None:
        """Fetch and hash the shard in the background. A failure is only logged, and `open_shard` tries again.

        Queued copies may take up to half of the cache's size, so that they do not evict each other.
        """
        address = remote_files.join_address(folder, shard.file)
        local_path = self._copy_path(shard) if remote_files.is_remote(folder) else address
        with self._lock:
            is_present = str(local_path) in self._verified_states and Path(local_path).exists()
            known = self._prefetch_queue, self._shards_in_progress, self._damage_messages
            if is_present or any(address in addresses for addresses in known):
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
                log.warning("%s; this was only a prefetch, so training will try the shard again", error)

    @contextmanager
    def _exclusive_access(self, address: str) -> Iterator[None]:
        """Let one thread at a time open a shard. Others wait, do not hash it again, and raise the same error if it fails."""
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
                remedy = "restore the folder or the file system mounted there"
                raise UserError(f"{folder}: no longer has a {MANIFEST_FILE}; {remedy}") from None
            raise missing_shard(path, shard) from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: the shard cannot be read ({reason}); restore the connection to it") from None

    def _open_verified(self, path: Path, shard: Shard, *, is_copy: bool = False) -> io.BufferedReader:
        with ExitStack() as on_error:
            opened = open(path, "rb", opener=open_private_file) if is_copy else open_regular_file(path)  # noqa: SIM115
            file = on_error.enter_context(opened)
            state = _file_state(file)
            if self._verified_states.get(str(path)) != state:
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
            private_folder(self._folder)
        except UserError as error:
            raise UserError(f"data.cache.folder: {error}") from None
        except OSError as error:
            raise self._folder_error(error) from None
        try:
            while (file := self._open_existing_copy(copy, shard)) is None:
                self._fetch_copy(folder, shard, copy)
            # Record the last use as the access time, because the modification time must reveal a change. The process's clock is
            # finer than the kernel's time stamps, which are equal for some milliseconds.
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            return file
        except OSError as error:
            raise self._folder_error(error) from None

    def _folder_error(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache.folder: {self._folder} cannot be used ({error.strerror or error}); it must be a local folder that "
            "this user can read and that has room for copies of shards; correct that, lower data.cache.max_size_gib, or "
            "name another folder"
        )

    def _open_existing_copy(self, copy: Path, shard: Shard) -> io.BufferedReader | None:
        """Open the copy. Return None if there is none, and remove it first if its content is wrong."""
        try:
            return self._open_verified(copy, shard, is_copy=True)
        except FileNotFoundError:
            return None
        except (DamagedShard, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, PermissionError) and error.errno != errno.EIO:
                raise  # the fault is in this process; the copy may be good, and others may use it
            log.warning("replacing a bad cached copy (no action is needed): %s", error)
            copy.unlink(missing_ok=True)
            return None

    def _fetch_copy(self, folder: str | Path, shard: Shard, copy: Path) -> None:
        """Fetch the copy, or wait until another process has fetched it. It may be gone again on return."""
        partial_path = copy.with_suffix(PARTIAL_SUFFIX)
        with _open_locked(partial_path) as file:
            try:
                if not copy.exists():
                    self._reserve_space(file, shard)
                    fetch_shard(folder, shard, file, self._settings)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._folder_lock():
                        partial_path.rename(copy)
                    sync_folder(self._folder)
                    self._verified_states[str(copy)] = _file_state(file)
            finally:
                if _is_same_file(partial_path, file):
                    partial_path.unlink()

    def _reserve_space(self, partial_file: BinaryIO, shard: Shard) -> None:
        """Allocate space for the shard in its partial file, and evict the least recently used copies if necessary.

        Wait while other downloads use the space. Raises: UserError if the shard is larger than the cache.
        """
        if shard.bytes > self._max_size_bytes:
            raise UserError(
                f"data.cache.max_size_gib: {self._settings.max_size_gib} is too small for shard {shard.file} of {shard.bytes} "
                "bytes; raise it so that the cache has room for several shards"
            )
        while True:
            with self._folder_lock():
                if self._evict(shard.bytes):
                    os.posix_fallocate(partial_file.fileno(), 0, shard.bytes)
                    return
            time.sleep(ROOM_POLL_SECONDS)

    def _folder_lock(self) -> BinaryIO:
        """Let one process at a time count and change the files in the folder, until the returned file is closed."""
        return _open_locked(self._folder / LOCK_FILE)

    def _evict(self, needed_bytes: int) -> bool:
        """Remove the least recently used copies until `needed_bytes` fit. Return whether they fit."""
        copies, used_bytes = [], needed_bytes
        for path in self._folder.iterdir():
            is_partial = path.suffix == PARTIAL_SUFFIX
            if not CACHE_FILE_PATTERN.fullmatch(path.name) or (is_partial and _remove_if_abandoned(path)):
                continue
            with suppress(FileNotFoundError):  # another process may have removed a failed download or a bad copy
                status = path.lstat()
                used_bytes += status.st_size
                if not is_partial:
                    copies.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, path))
        for _, size_bytes, path in sorted(copies):
            if used_bytes <= self._max_size_bytes:
                break
            path.unlink(missing_ok=True)
            self._verified_states.pop(str(path), None)
            used_bytes -= size_bytes
        return used_bytes <= self._max_size_bytes


def _file_state(file: BinaryIO) -> tuple[int, int, int]:
    """Return inode, size and modification time of a file."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_locked(path: Path) -> io.BufferedRandom:
    """Open or create a file of this user and lock it. Replace a file that another user has made or could lock.

    Raises: OSError, also if the file system does not keep the permissions of a new file.
    """
    has_replaced = False
    while True:
        try:
            file = os.fdopen(open_private_file(path, os.O_RDWR | os.O_CREAT), "r+b")
        except PermissionError:
            if has_replaced:
                raise
            path.unlink(missing_ok=True)
            has_replaced = True
            continue
        if os.fstat(file.fileno()).st_mode & 0o077:  # made by an earlier version
            if has_replaced:
                file.close()
                raise PermissionError(errno.EPERM, "the file system does not keep the permissions of files", str(path))
            path.unlink(missing_ok=True)
            has_replaced = True
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_same_file(path, file):
            return file
        file.close()


def _is_same_file(path: Path, file: BinaryIO) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(partial_path: Path) -> bool:
    """Remove a partial file whose writer has ended. Return whether it is gone."""
    try:
        with open(partial_path, "rb", opener=open_private_file) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(partial_path, file):
                partial_path.unlink()
            return True
    except FileNotFoundError:
        return True
    except PermissionError:
        partial_path.unlink()
        return True
    except BlockingIOError:
        return False
