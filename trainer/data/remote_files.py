"""Lists and reads files by address: local paths, http(s), s3 and gs. Nothing is kept on disk here (see `shard_cache`).

This is the only module that uses fsspec, and it imports fsspec when the first remote address is used. Every failure (a timeout,
a server error, a response that ends early) becomes a `RemoteError`. `RetryPolicy` logs it and waits, and reading continues at
the byte where it stopped. If a server does not support ranges, the bytes before that position are read again and dropped.
"""

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
"""Supported address schemes, and the package to install for each."""
DEFAULT_SETTINGS = ShardCacheConfig()
"""Attempts and timeout for files that are not shards."""
BLOCK_BYTES = 8 << 20
VERSION_KEYS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated")

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class FileChanged(OSError):
    """The file is another one than when it was opened."""


class RemoteError(OSError):
    """The server or the network failed, perhaps temporarily."""


class RemoteFileMissing(RemoteError):
    """The server reports that the file does not exist, so a retry is pointless."""


class RangeNotSatisfiable(RemoteError):
    """The server reports that the file ends before the first requested byte."""


class AccessDenied(RemoteError):
    """The server rejects the credentials."""


@dataclass(frozen=True)
class RemoteFile:
    name: str
    """The path below the requested address, or the file's own name if the address is the file."""
    address: str
    size_bytes: int
    version: str
    """Differs if the content differs: ETag, generation or time of the last change."""


class RetryPolicy:
    """Allows one fetch up to `max_attempts` attempts: logs each failure and waits. Errors in `fatal_errors` are not retried."""

    def __init__(self, description: str, settings: ShardCacheConfig, fatal_errors: tuple[type[RemoteError], ...]):
        self.num_failures = 0
        self._description, self._settings, self._fatal_errors = description, settings, fatal_errors

    def wait_or_raise(self, error: RemoteError) -> None:
        """Wait before the next attempt, or raise the error if no attempt is left."""
        self.num_failures += 1
        attempts, pause_seconds = self._settings.max_attempts, self._settings.retry_delay_seconds(self.num_failures)
        if self.num_failures >= attempts or isinstance(error, self._fatal_errors):
            raise error
        values = self._description, self.num_failures, attempts, error, pause_seconds
        log.warning("%s: attempt %d of %d failed (%s); retry in %.3g s", *values)
        time.sleep(pause_seconds)


def is_remote(address: str | Path) -> bool:
    return "://" in str(address)


def join_address(folder: str | Path, name: str) -> str:
    """Return the address of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def read_bytes(address: str | Path, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> bytes:
    """Read a whole small file. Raises: OSError with a one-line message."""
    if not is_remote(address):
        return Path(address).read_bytes()
    return _retry(str(address), settings, lambda: b"".join(read_blocks(str(address), 0, settings.timeout_seconds)))


def list_files(address: str, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> list[RemoteFile]:
    """List a file, all files below a folder, or all that match a pattern with *, sorted by name. There may be none.

    Over http, a folder's address ends in /, and the server must offer an index of it.
    Raises: UserError if the address cannot be read.
    """
    try:
        found = _retry(address, settings, lambda: _list_once(address, settings.timeout_seconds))
    except (OSError, ValueError) as error:  # a bad pattern is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: cannot be read ({error}); correct the address or restore the connection") from None
    return sorted(found, key=lambda file: file.name.split("/"))


def open_file(address: str | Path, settings: ShardCacheConfig = DEFAULT_SETTINGS) -> BinaryIO:
    """Open a file at its beginning. It supports seek, which costs a request if the file is remote.

    Failed reads of a remote file are retried. The file must not change while it is read.
    Raises: OSError with a one-line message, also from reading.
    """
    if is_remote(address):
        return io.BufferedReader(_RemoteReader(str(address), settings), BLOCK_BYTES)
    return open(address, "rb")


def read_blocks(address: str, start_byte: int, timeout_seconds: float) -> Generator[bytes, None, None]:
    """Yield the bytes of a remote file from `start_byte` on in blocks, over one connection. Raises: RemoteError."""
    stream_context = _open_stream(address, start_byte, timeout_seconds)
    with suppress(RangeNotSatisfiable), _translate_errors(), stream_context as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


class _RemoteReader(io.RawIOBase):
    """A remote file with a position. The first read, and the first read after a seek, opens a connection."""

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
                raise RemoteError(f"the file ended at byte {self._position} of {self._file.size_bytes}")
            except RemoteError as error:
                self._blocks = iter(())
                retry_policy.wait_or_raise(error)

    def _reconnect(self) -> None:
        address, timeout_seconds = self._file.address, self._settings.timeout_seconds
        if self._position and _stat(address, timeout_seconds) != self._file:
            raise FileChanged(f"{address}: the file changed while it was read")
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
            f"{address}: {scheme}:// is not supported; copy the files to a local folder or to an address that starts with one "
            f"of {', '.join(PIP_REQUIREMENTS)}"
        )
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, **_filesystem_options(scheme, timeout_seconds))
    except ImportError as error:
        raise UserError(f"{address}: cannot be read ({error}); run pip install '{PIP_REQUIREMENTS[scheme]}'") from None


def _filesystem_options(scheme: str, timeout_seconds: float) -> dict[str, Any]:
    if scheme == "s3":
        timeouts = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        return {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}}  # `RetryPolicy` retries
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    # Request the stored bytes: some servers declare .gz files as gzip-encoded, and aiohttp would decompress them.
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
    # A nonzero size avoids a request for it. With block_size 0, fsspec streams the body of one response.
    with system.open(address, "rb", block_size=0, size=1, headers=headers) as stream:
        content_range = re.match(r"bytes (\d+)-", stream.r.headers.get("Content-Range", ""))
        surplus_bytes = start_byte - (int(content_range[1]) if content_range else 0)
        while surplus_bytes > 0 and (block := stream.read(min(surplus_bytes, BLOCK_BYTES))):
            surplus_bytes -= len(block)
        if surplus_bytes:
            raise RemoteError(f"the server did not return the requested bytes, which start at byte {start_byte}")
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
        if address.startswith("http"):  # an index contains only names
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
        raise OSError(f"{address}: the server does not report the size of this file; copy the file to a local folder")
    version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), str(info["size"]))
    return RemoteFile(name, address, info["size"], version)


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Convert the libraries' server and network errors to RemoteError with a one-line message."""
    try:
        yield
    except RemoteError:
        raise
    except _network_errors() as error:
        reason: BaseException | None = error
        cause = error.__cause__
        http_errors: tuple[type[Exception], ...] = (TimeoutError, *_loaded_error_types("aiohttp.ClientError"))
        if isinstance(error, FileNotFoundError) and isinstance(cause, http_errors):
            reason = cause  # over http, fsspec 2026.9 raises FileNotFoundError for every failure
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
    return OSError, *_loaded_error_types(
        "aiohttp.ClientError", "botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError",
        "google.auth.exceptions.GoogleAuthError", "gcsfs.retry.HttpError", "gcsfs.retry.ChecksumError",
    )  # fmt: skip


def _loaded_error_types(*names: str) -> tuple[type[Exception], ...]:
    """Return those of the error types whose module is loaded. A library that is not loaded cannot have raised an error."""
    modules_and_types = [name.rsplit(".", 1) for name in names]
    return tuple(getattr(sys.modules[module], name) for module, name in modules_and_types if module in sys.modules)
