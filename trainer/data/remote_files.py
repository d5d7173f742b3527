"""Lists and reads files by address: local paths, http(s), s3 and gs. Nothing is kept on disk here (see `shard_cache`).

A server cannot hold a reader forever: it must send its headers within a time, and its bytes at the rate in `data.cache`, and a
file that is read whole has a largest size. The time in which the caller works between two blocks does not count.

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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from tandem.trainer.config import ShardCacheConfig, UserError
from tandem.trainer.config.addresses import has_hidden_part
from tandem.trainer.config.outside import MAX_FILE_BYTES, file_too_large, open_regular_file, read_file

PIP_REQUIREMENTS = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "tandem[s3]", "gs": "tandem[gs]"}
"""Supported address schemes, and the package to install for each."""
DEFAULT_SETTINGS = ShardCacheConfig()
"""Attempts and timeout for files that are not shards."""
BLOCK_BYTES = 8 << 20
WINDOW_TIMEOUTS = 2
"""Timeouts in the window over which a server's rate is measured, and in the longest wait for its headers."""
LISTING_TIMEOUTS = 20
"""Timeouts in the longest listing of files: ten minutes by default, in which a store lists a million files."""
MAX_INDEX_BYTES = 64 << 20
"""Largest page of an index. A line of an index takes about 100 bytes, so this is more than half a million files."""
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


class TooSlow(RemoteError):
    """The server sends bytes more slowly than `data.cache.min_bytes_per_second`."""


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
    """Return the address of a file in a folder. Over http, a folder's query may be a signature for its files."""
    if not is_remote(folder):
        return str(Path(folder) / name)
    path, mark, query = str(folder).partition("?" if str(folder).startswith("http") else "\0")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def read_bytes(
    address: str | Path, settings: ShardCacheConfig = DEFAULT_SETTINGS, max_bytes: int = MAX_FILE_BYTES
) -> bytes:
    """Read a whole small file of at most `max_bytes`. Raises: OSError with a one-line message."""
    if not is_remote(address):
        return read_file(address, max_bytes)

    def read_once() -> bytes:
        content = bytearray()
        with closing(read_blocks(str(address), 0, settings)) as blocks:
            for block in blocks:
                content += block
                if len(content) > max_bytes:
                    raise file_too_large(address, max_bytes)
        return bytes(content)

    return _retry(str(address), settings, read_once)


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
    return open_regular_file(address)


def read_blocks(address: str, start_byte: int, settings: ShardCacheConfig) -> Generator[bytes, None, None]:
    """Yield the bytes of a remote file from `start_byte` on in blocks, over one connection. Raises: RemoteError."""
    window_bytes, window_seconds = 0, 0.0
    stream_context = _open_stream(address, start_byte, settings)
    with suppress(RangeNotSatisfiable), _translate_errors(), stream_context as (read_block, surplus_bytes):
        while True:
            start_time = time.monotonic()
            block = read_block()
            window_seconds += time.monotonic() - start_time
            window_bytes += len(block)
            if not block and surplus_bytes:
                raise RemoteError(f"the server did not return the requested bytes, which start at byte {start_byte}")
            if not block:
                return
            if window_seconds >= WINDOW_TIMEOUTS * settings.timeout_seconds:
                if window_bytes < settings.min_bytes_per_second * window_seconds:
                    rule = f"data.cache.min_bytes_per_second is {settings.min_bytes_per_second:g}"
                    raise TooSlow(f"only {window_bytes} bytes came in {window_seconds:.3g} s; {rule}")
                window_bytes, window_seconds = 0, 0.0
            dropped_bytes = min(surplus_bytes, len(block))
            surplus_bytes -= dropped_bytes
            if len(block) > dropped_bytes:
                yield block[dropped_bytes:]


class _RemoteReader(io.RawIOBase):
    """A remote file with a position. The first read, and the first read after a seek, opens a connection."""

    mode = "rb"

    def __init__(self, address: str, settings: ShardCacheConfig):
        (self._file,) = _retry(address, settings, lambda: [_stat(address, settings.timeout_seconds)])
        self.name, self._settings, self._position = address, settings, 0
        self._blocks: Iterator[bytes] = iter(())
        self._unread = memoryview(b"")
        self._slow_retry_policy, self._slow_position = self._new_retry_policy(), 0

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
        retry_policy = self._new_retry_policy()
        while True:
            try:
                block = next(self._blocks, b"")
                if not block:
                    self._reconnect()
                    block = next(self._blocks, b"")
                if not block:
                    raise RemoteError(f"the file ended at byte {self._position} of {self._file.size_bytes}")
                if self._position + len(block) > self._file.size_bytes:
                    raise FileChanged(f"the server sends more than the {self._file.size_bytes} bytes that it announced")
                return block
            except TooSlow as error:
                self._blocks = iter(())
                # A slow server sends some bytes in each attempt, so only a whole block counts as progress.
                if self._position - self._slow_position >= BLOCK_BYTES:
                    self._slow_retry_policy = self._new_retry_policy()
                self._slow_position = self._position
                self._slow_retry_policy.wait_or_raise(error)
            except RemoteError as error:
                self._blocks = iter(())
                retry_policy.wait_or_raise(error)

    def _new_retry_policy(self) -> RetryPolicy:
        return RetryPolicy(self._file.address, self._settings, (RemoteFileMissing,))

    def _reconnect(self) -> None:
        address, timeout_seconds = self._file.address, self._settings.timeout_seconds
        if self._position and _stat(address, timeout_seconds) != self._file:
            raise FileChanged(f"{address}: the file changed while it was read")
        self._blocks = read_blocks(address, self._position, self._settings)


def _retry(description: str, settings: ShardCacheConfig, call: Callable[[], Result]) -> Result:
    retry_policy = RetryPolicy(description, settings, (RemoteFileMissing, AccessDenied))
    while True:
        try:
            return call()
        except RemoteError as error:
            retry_policy.wait_or_raise(error)


def _open_filesystem(address: str, timeout_seconds: float) -> Any:
    scheme = address.split("://")[0]
    if has_hidden_part(address):
        remedy = "give the config with which the run was started, or the whole address"
        raise UserError(f"{address}: was written by Tandem, which leaves out names, passwords and signatures; {remedy}")
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
    client_settings["response_class"] = _index_response_class()
    return {"client_kwargs": client_settings, "headers": {"Accept-Encoding": "identity"}}


@cache
def _index_response_class() -> Any:
    import aiohttp

    class IndexResponse(aiohttp.ClientResponse):
        """A response whose `text`, with which fsspec reads an index, is limited. Files are read in blocks instead."""

        async def read(self) -> bytes:
            if self._body is None:
                content = bytearray()
                while block := await self.content.read(BLOCK_BYTES):
                    content += block
                    if len(content) > MAX_INDEX_BYTES:
                        self.close()
                        raise aiohttp.ClientPayloadError(f"the index has more than {MAX_INDEX_BYTES:,} bytes")
                self._body = bytes(content)
            return self._body

    return IndexResponse


@contextmanager
def _open_stream(
    address: str, start_byte: int, settings: ShardCacheConfig
) -> Iterator[tuple[Callable[[], bytes], int]]:
    """Yield a function that reads the next block, and the number of bytes before `start_byte` that it returns first."""
    from fsspec.asyn import sync

    system, wait_seconds = (
        _open_filesystem(address, settings.timeout_seconds),
        WINDOW_TIMEOUTS * settings.timeout_seconds,
    )
    if not address.startswith("http"):
        end_byte, position = system.info(address, timeout=wait_seconds)["size"], start_byte
        slowest_seconds = BLOCK_BYTES / settings.min_bytes_per_second if settings.min_bytes_per_second else None

        def read_range() -> bytes:
            nonlocal position
            if position >= end_byte:
                return b""
            block: bytes = system.cat_file(
                address, start=position, end=min(position + BLOCK_BYTES, end_byte), timeout=slowest_seconds
            )
            position += len(block)
            return block

        yield read_range, 0
        return

    async def request() -> Any:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start_byte}-"} if start_byte else {})
        session = await system.set_session()
        response = await session.get(system.encode_url(address), headers=headers)
        if response.status == 404:
            raise FileNotFoundError(address)
        response.raise_for_status()
        return response

    response = sync(system.loop, request, timeout=wait_seconds)
    try:
        content_range = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
        surplus_bytes = start_byte - (int(content_range[1]) if content_range else 0)
        if surplus_bytes < 0:
            raise RemoteError(f"the server did not return the requested bytes, which start at byte {start_byte}")
        yield lambda: sync(system.loop, response.content.read, BLOCK_BYTES), surplus_bytes
    finally:
        system.loop.call_soon_threadsafe(response.close)


def _list_once(address: str, timeout_seconds: float) -> list[RemoteFile]:
    system = _open_filesystem(address, timeout_seconds)
    root = address.split("*")[0].rsplit("/", 1)[0] if "*" in address else address.rstrip("/")
    wait_seconds = WINDOW_TIMEOUTS * timeout_seconds
    with _translate_errors():
        if "*" in address:
            infos = system.glob(address, detail=True, timeout=LISTING_TIMEOUTS * timeout_seconds)
        elif address.startswith("http") and not address.endswith("/"):
            return [_stat(address, timeout_seconds)]
        else:
            infos = system.find(address, detail=True, timeout=LISTING_TIMEOUTS * timeout_seconds)
        infos = {system.unstrip_protocol(name): info for name, info in infos.items() if info["type"] == "file"}
        if address.startswith("http"):  # an index contains only names
            with ThreadPoolExecutor(8) as threads:
                infos = dict(
                    zip(infos, threads.map(lambda name: system.info(name, timeout=wait_seconds), infos), strict=True)
                )
    return [
        _remote_file(name, info, unquote(name.removeprefix(root).lstrip("/")) or name.rsplit("/", 1)[-1])
        for name, info in infos.items()
    ]


def _stat(address: str, timeout_seconds: float) -> RemoteFile:
    with _translate_errors():
        info = _open_filesystem(address, timeout_seconds).info(address, timeout=WINDOW_TIMEOUTS * timeout_seconds)
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
