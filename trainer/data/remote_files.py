"""Files by address, on this machine or over http(s), s3 and gs: what is there, how long it is, and its bytes.

The one door to fsspec, which is imported when the first remote address is used. Nothing is kept on disk here
(see `shard_cache`). The one idea: a remote file is a position. Whatever fails on the way (a timeout, an error of the
server, a body that ends early) is a `RemoteError`, which `RetryPolicy` logs and waits for, and the file is then
read on from where it broke; where a server knows no ranges, the bytes already had are read again and dropped.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from tandem.trainer.config import ShardCacheConfig, UserError

PIP_REQUIREMENTS = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "tandem[s3]", "gs": "tandem[gs]"}
"""What to install for the addresses that can be read."""
DEFAULT_SETTINGS = ShardCacheConfig()
"""How patiently files are read that are not shards: the tries and the timeout of a config that names none."""
BLOCK_BYTES = 8 << 20
VERSION_KEYS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated")

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class RemoteError(OSError):
    """The server or the network failed; it may not the next time."""


class RemoteFileMissing(RemoteError):
    """The server says that there is no such file: an answer, so asking again is no use."""


class RangeNotSatisfiable(RemoteError):
    """The server says that the file ends before the first byte that was asked for."""


class AccessDenied(RemoteError):
    """The server wants other credentials."""


@dataclass(frozen=True)
class RemoteFile:
    name: str
    """The path below the address that was asked for; the file's own name where that is the file."""
    address: str
    size_bytes: int
    version: str
    """Another one where the content is another: ETag, generation or time of the last change."""


class RetryPolicy:
    """Counts the failures of one fetch: each is logged and waited for, until there were too many or one is `fatal_errors`."""

    def __init__(self, description: str, settings: ShardCacheConfig, fatal_errors: tuple[type[RemoteError], ...]):
        self.num_failures = 0
        self._description, self._settings, self._fatal_errors = description, settings, fatal_errors

    def wait_or_raise(self, error: RemoteError) -> None:
        """Returns after the pause; raises the error where there is nothing left to wait for."""
        self.num_failures += 1
        attempts, pause_seconds = self._settings.max_attempts, self._settings.retry_delay_seconds(self.num_failures)
        if self.num_failures >= attempts or isinstance(error, self._fatal_errors):
            raise error
        log.warning(
            "%s: try %d of %d: %s; again in %.3g s",
            self._description,
            self.num_failures,
            attempts,
            error,
            pause_seconds,
        )
        time.sleep(pause_seconds)


def is_remote(address: str | Path) -> bool:
    return "://" in str(address)


def join_address(folder: str | Path, name: str) -> str:
    """The address of a file by its name in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def read_bytes(address: str | Path, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> bytes:
    """The bytes of a whole small file.

    Raises: OSError, in one line.
    """
    if not is_remote(address):
        return Path(address).read_bytes()
    return _retry(str(address), settings, lambda: b"".join(read_blocks(str(address), 0, settings.timeout_seconds)))


def list_files(address: str, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> list[RemoteFile]:
    """What a remote address names, sorted by name: a file, all files below a folder, or those that a pattern with *
    matches. Over http a folder ends in /, and its server must show an index of it.

    Raises: UserError where it cannot be read; nothing is found where nothing is there.
    """
    try:
        found = _retry(address, settings, lambda: _list_once(address, settings.timeout_seconds))
    except (OSError, ValueError) as error:  # a bad pattern is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: cannot be read ({error}); correct it, or restore the way to it") from None
    return sorted(found, key=lambda file: file.name.split("/"))


def open_file(address: str | Path, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> BinaryIO:
    """The file, open at its beginning. It can seek; a seek costs a request where the file is remote.

    A remote file that fails is tried again, and must not change while it is read.
    Raises: OSError, in one line, also from reading.
    """
    if is_remote(address):
        return io.BufferedReader(_RemoteReader(str(address), settings), BLOCK_BYTES)
    return open(address, "rb")


def read_blocks(address: str, start_byte: int, timeout_seconds: float) -> Generator[bytes, None, None]:
    """The bytes of a remote file from `start_byte` on, over one connection, in blocks as they come.

    Raises: RemoteError.
    """
    with (
        suppress(RangeNotSatisfiable),
        _translate_errors(),
        _open_stream(address, start_byte, timeout_seconds) as stream,
    ):
        while block := stream.read(BLOCK_BYTES):
            yield block


class _RemoteReader(io.RawIOBase):
    """A remote file at a position. The connection is opened by the first read, and again by one after a seek."""

    mode = "rb"

    def __init__(self, address: str, settings: ShardCacheConfig):
        (self._file,) = _retry(address, settings, lambda: [_stat(address, settings.timeout_seconds)])
        self.name, self._settings, self._position = address, settings, 0
        self._blocks: Iterator[bytes] = iter(())
        self._unread = memoryview(b"")

    def close(self) -> None:
        self._blocks = iter(())
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size_bytes}[whence]
        if target != self._position:
            self._blocks, self._unread, self._position = iter(()), memoryview(b""), target
        return target

    def readinto(self, buffer: Any) -> int:
        if not self._unread and self._position < self._file.size_bytes:
            self._unread = memoryview(self._next_block())
        num_bytes = min(len(buffer), len(self._unread))
        buffer[:num_bytes] = self._unread[:num_bytes]
        self._unread, self._position = self._unread[num_bytes:], self._position + num_bytes
        return num_bytes

    def _next_block(self) -> bytes:
        settings = self._settings
        retry_policy = RetryPolicy(self._file.address, settings, (RemoteFileMissing,))
        while True:
            try:
                if block := next(self._blocks, b""):
                    return block
                self._reconnect()
                if block := next(self._blocks, b""):
                    return block
                raise RemoteError(f"ended at byte {self._position} of {self._file.size_bytes}")
            except RemoteError as error:
                self._blocks = iter(())
                retry_policy.wait_or_raise(error)

    def _reconnect(self) -> None:
        address, timeout_seconds = self._file.address, self._settings.timeout_seconds
        if self._position and _stat(address, timeout_seconds) != self._file:
            raise OSError(f"{address}: changed while it was read; read it again from its beginning")
        self._blocks = read_blocks(address, self._position, timeout_seconds)


def _retry(description: str, settings: ShardCacheConfig, call: Callable[[], Result]) -> Result:
    retry_policy = RetryPolicy(description, settings, (RemoteFileMissing, AccessDenied))
    while True:
        try:
            return call()
        except RemoteError as error:
            retry_policy.wait_or_raise(error)


def _open_filesystem(address: str, timeout_seconds: float) -> Any:
    scheme = address.split("://")[0]
    if scheme not in PIP_REQUIREMENTS:
        raise UserError(
            f"{address}: cannot read {scheme}://; must be a local path or one of {', '.join(PIP_REQUIREMENTS)}; copy the files"
        )
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, **_filesystem_options(scheme, timeout_seconds))
    except ImportError as error:
        raise UserError(f"{address}: {error}; pip install '{PIP_REQUIREMENTS[scheme]}'") from None


def _filesystem_options(scheme: str, timeout_seconds: float) -> dict[str, Any]:
    if scheme == "s3":
        single_attempt = {"total_max_attempts": 1}  # tries are counted, and logged, by `RetryPolicy`
        return {
            "config_kwargs": {
                "connect_timeout": timeout_seconds,
                "read_timeout": timeout_seconds,
                "retries": single_attempt,
            }
        }
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    # Bytes as they are stored: some servers call every .gz file an encoding, which aiohttp would undo.
    client_settings = {"timeout": timeout, "auto_decompress": False, "trust_env": True, "read_bufsize": 1 << 20}
    return {"client_kwargs": client_settings, "headers": {"Accept-Encoding": "identity"}}


@contextmanager
def _open_stream(address: str, start_byte: int, timeout_seconds: float) -> Iterator[Any]:
    system = _open_filesystem(address, timeout_seconds)
    if not address.startswith("http"):
        with system.open(address, "rb", block_size=BLOCK_BYTES, cache_type="none") as stream:
            stream.seek(start_byte)
            yield stream
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start_byte}-"} if start_byte else {})
    # A size that is not zero spares a question; no block size gives the body of one response.
    with system.open(address, "rb", block_size=0, size=1, headers=headers) as stream:
        content_range = re.match(r"bytes (\d+)-", stream.r.headers.get("Content-Range", ""))
        surplus_bytes = start_byte - (int(content_range[1]) if content_range else 0)
        while surplus_bytes > 0 and (block := stream.read(min(surplus_bytes, BLOCK_BYTES))):
            surplus_bytes -= len(block)
        if surplus_bytes:
            raise RemoteError(f"asked for bytes from {start_byte} on, the server gave others")
        yield stream


def _list_once(address: str, timeout_seconds: float) -> list[RemoteFile]:
    system = _open_filesystem(address, timeout_seconds)
    root = address.split("*")[0].rsplit("/", 1)[0] if "*" in address else address.rstrip("/")
    with _translate_errors():
        if "*" in address:
            infos = system.glob(address, detail=True)
        elif address.startswith("http") and not address.endswith("/"):
            return [_stat(address, timeout_seconds)]
        else:
            infos = system.find(address, detail=True)
        infos = {system.unstrip_protocol(name): info for name, info in infos.items() if info["type"] == "file"}
        if address.startswith("http"):  # an index has names only
            with ThreadPoolExecutor(8) as threads:
                infos = dict(zip(infos, threads.map(lambda name: system.info(name), infos), strict=True))
    return [
        _remote_file(name, info, unquote(name.removeprefix(root).lstrip("/")) or name.rsplit("/", 1)[-1])
        for name, info in infos.items()
    ]


def _stat(address: str, timeout_seconds: float) -> RemoteFile:
    with _translate_errors():
        info = _open_filesystem(address, timeout_seconds).info(address)
    return _remote_file(address, info, unquote(address.rsplit("/", 1)[-1]))


def _remote_file(address: str, info: dict[str, Any], name: str) -> RemoteFile:
    if info["size"] is None:
        raise OSError(f"{address}: the server does not say how long it is; copy it to a local folder")
    version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), str(info["size"]))
    return RemoteFile(name, address, info["size"], version)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """What the libraries raise for a server or a network that fails, as one of ours, in one line."""
    try:
        yield
    except RemoteError:
        raise
    except _network_errors() as error:
        reason: BaseException | None = error
        cause = error.__cause__
        if isinstance(error, FileNotFoundError) and isinstance(cause, (TimeoutError, *_loaded_error_types("aiohttp"))):
            reason = cause  # whatever fails, fsspec 2026.9 over http says that the file is not found
        status = getattr(reason, "status", None)
        text = " ".join(f"{type(reason).__name__}: {str(reason) or 'no bytes came in time'}".split())[:200]
        if status in (404, 410) or (status is None and isinstance(reason, FileNotFoundError)):
            raise RemoteFileMissing(text) from None
        if status == 416:
            raise RangeNotSatisfiable(text) from None
        if status in (401, 403) or isinstance(reason, PermissionError):
            raise AccessDenied(text) from None
        raise RemoteError(text) from None


def _network_errors() -> tuple[type[Exception], ...]:
    return OSError, *_loaded_error_types("aiohttp", "botocore", "google", "gcsfs")


def _loaded_error_types(*libraries: str) -> tuple[type[Exception], ...]:
    """The errors of these libraries that are not of ours to import; one that is not loaded has raised none."""
    names = (
        ("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"), ("gcsfs.retry", "HttpError"), ("gcsfs.retry", "ChecksumError"),
    )  # fmt: skip
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in names
        if module in sys.modules and module.split(".")[0] in libraries
    )
