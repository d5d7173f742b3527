"""Files by address, on this machine or over http(s), s3 and gs: what is there, how long it is, and its bytes.

The one door to fsspec, which is imported when the first remote address is used. Nothing is kept on disk here
(see `cache`). The one idea: a remote file is a position. Whatever fails on the way (a timeout, an error of the
server, a body that ends early) is an `Unreachable`, which `Patience` logs and waits for, and the file is then
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

from tandem.trainer.config import Cache, UserError

REQUIREMENTS = {"http": "fsspec[http]", "https": "fsspec[http]", "s3": "tandem[s3]", "gs": "tandem[gs]"}
"""What to install for the addresses that can be read."""
PATIENCE = Cache()
"""How patiently files are read that are not shards: the tries and the timeout of a config that names none."""
BLOCK_BYTES = 8 << 20
VERSIONS = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "updated")

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Unreachable(OSError):
    """The server or the network failed; it may not the next time."""


class Missing(Unreachable):
    """The server says that there is no such file: an answer, so asking again is no use."""


class Ended(Unreachable):
    """The server says that the file ends before the first byte that was asked for."""


class Refused(Unreachable):
    """The server wants other credentials."""


@dataclass(frozen=True)
class File:
    name: str
    """The path below the address that was asked for; the file's own name where that is the file."""
    address: str
    bytes: int
    version: str
    """Another one where the content is another: ETag, generation or time of the last change."""


class Patience:
    """Counts the failures of one fetch: each is logged and waited for, until there were too many or one is `final`."""

    def __init__(self, what: str, settings: Cache, final: tuple[type[Unreachable], ...]):
        self.failures = 0
        self._what, self._settings, self._final = what, settings, final

    def failed(self, error: Unreachable) -> None:
        """Returns after the pause; raises the error where there is nothing left to wait for."""
        self.failures += 1
        attempts, pause_seconds = self._settings.attempts, self._settings.pause_seconds(self.failures)
        if self.failures >= attempts or isinstance(error, self._final):
            raise error
        log.warning("%s: try %d of %d: %s; again in %.3g s", self._what, self.failures, attempts, error, pause_seconds)
        time.sleep(pause_seconds)


def is_remote(address: str | Path) -> bool:
    return "://" in str(address)


def below(folder: str | Path, name: str) -> str:
    """The address of a file by its name in a folder."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def content(address: str | Path, settings: Cache = PATIENCE) -> bytes:
    """The bytes of a whole small file.

    Raises: OSError, in one line.
    """
    if not is_remote(address):
        return Path(address).read_bytes()
    return _tried(str(address), settings, lambda: b"".join(blocks(str(address), 0, settings.timeout_seconds)))


def files(address: str, settings: Cache = PATIENCE) -> list[File]:
    """What a remote address names, sorted by name: a file, all files below a folder, or those that a pattern with *
    matches. Over http a folder ends in /, and its server must show an index of it.

    Raises: UserError where it cannot be read; nothing is found where nothing is there.
    """
    try:
        found = _tried(address, settings, lambda: _listed(address, settings.timeout_seconds))
    except (OSError, ValueError) as error:  # a bad pattern is a ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: cannot be read ({error}); correct it, or restore the way to it") from None
    return sorted(found, key=lambda file: file.name.split("/"))


def opened(address: str | Path, settings: Cache = PATIENCE) -> BinaryIO:
    """The file, open at its beginning. It can seek; a seek costs a request where the file is remote.

    A remote file that fails is tried again, and must not change while it is read.
    Raises: OSError, in one line, also from reading.
    """
    if is_remote(address):
        return io.BufferedReader(_Elsewhere(str(address), settings), BLOCK_BYTES)
    return open(address, "rb")


def blocks(address: str, start: int, timeout_seconds: float) -> Generator[bytes, None, None]:
    """The bytes of a remote file from `start` on, over one connection, in blocks as they come.

    Raises: Unreachable.
    """
    with suppress(Ended), _failures(), _stream(address, start, timeout_seconds) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


class _Elsewhere(io.RawIOBase):
    """A remote file at a position. The connection is opened by the first read, and again by one after a seek."""

    mode = "rb"

    def __init__(self, address: str, settings: Cache):
        (self._file,) = _tried(address, settings, lambda: [_described(address, settings.timeout_seconds)])
        self.name, self._settings, self._position = address, settings, 0
        self._blocks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")

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
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.bytes}[whence]
        if target != self._position:
            self._blocks, self._rest, self._position = iter(()), memoryview(b""), target
        return target

    def readinto(self, buffer: Any) -> int:
        if not self._rest and self._position < self._file.bytes:
            self._rest = memoryview(self._next())
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest, self._position = self._rest[taken:], self._position + taken
        return taken

    def _next(self) -> bytes:
        settings = self._settings
        patience = Patience(self._file.address, settings, (Missing,))
        while True:
            try:
                if block := next(self._blocks, b""):
                    return block
                self._reconnect()
                if block := next(self._blocks, b""):
                    return block
                raise Unreachable(f"ended at byte {self._position} of {self._file.bytes}")
            except Unreachable as error:
                self._blocks = iter(())
                patience.failed(error)

    def _reconnect(self) -> None:
        address, timeout_seconds = self._file.address, self._settings.timeout_seconds
        if self._position and _described(address, timeout_seconds) != self._file:
            raise OSError(f"{address}: changed while it was read; read it again from its beginning")
        self._blocks = blocks(address, self._position, timeout_seconds)


def _tried(what: str, settings: Cache, call: Callable[[], Result]) -> Result:
    patience = Patience(what, settings, (Missing, Refused))
    while True:
        try:
            return call()
        except Unreachable as error:
            patience.failed(error)


def _filesystem(address: str, timeout_seconds: float) -> Any:
    scheme = address.split("://")[0]
    if scheme not in REQUIREMENTS:
        raise UserError(
            f"{address}: cannot read {scheme}://; must be a local path or one of {', '.join(REQUIREMENTS)}; copy the files"
        )
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, **_options(scheme, timeout_seconds))
    except ImportError as error:
        raise UserError(f"{address}: {error}; pip install '{REQUIREMENTS[scheme]}'") from None


def _options(scheme: str, timeout_seconds: float) -> dict[str, Any]:
    if scheme == "s3":
        once = {"total_max_attempts": 1}  # tries are counted, and logged, by `Patience`
        return {"config_kwargs": {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": once}}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    # Bytes as they are stored: some servers call every .gz file an encoding, which aiohttp would undo.
    client = {"timeout": timeout, "auto_decompress": False, "trust_env": True, "read_bufsize": 1 << 20}
    return {"client_kwargs": client, "headers": {"Accept-Encoding": "identity"}}


@contextmanager
def _stream(address: str, start: int, timeout_seconds: float) -> Iterator[Any]:
    system = _filesystem(address, timeout_seconds)
    if not address.startswith("http"):
        with system.open(address, "rb", block_size=BLOCK_BYTES, cache_type="none") as stream:
            stream.seek(start)
            yield stream
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    # A size that is not zero spares a question; no block size gives the body of one response.
    with system.open(address, "rb", block_size=0, size=1, headers=headers) as stream:
        given = re.match(r"bytes (\d+)-", stream.r.headers.get("Content-Range", ""))
        surplus = start - (int(given[1]) if given else 0)
        while surplus > 0 and (block := stream.read(min(surplus, BLOCK_BYTES))):
            surplus -= len(block)
        if surplus:
            raise Unreachable(f"asked for bytes from {start} on, the server gave others")
        yield stream


def _listed(address: str, timeout_seconds: float) -> list[File]:
    system = _filesystem(address, timeout_seconds)
    root = address.split("*")[0].rsplit("/", 1)[0] if "*" in address else address.rstrip("/")
    with _failures():
        if "*" in address:
            found = system.glob(address, detail=True)
        elif address.startswith("http") and not address.endswith("/"):
            return [_described(address, timeout_seconds)]
        else:
            found = system.find(address, detail=True)
        found = {system.unstrip_protocol(name): info for name, info in found.items() if info["type"] == "file"}
        if address.startswith("http"):  # an index has names only
            with ThreadPoolExecutor(8) as threads:
                found = dict(zip(found, threads.map(lambda name: system.info(name), found), strict=True))
    return [
        _file(name, info, unquote(name.removeprefix(root).lstrip("/")) or name.rsplit("/", 1)[-1])
        for name, info in found.items()
    ]


def _described(address: str, timeout_seconds: float) -> File:
    with _failures():
        info = _filesystem(address, timeout_seconds).info(address)
    return _file(address, info, unquote(address.rsplit("/", 1)[-1]))


def _file(address: str, info: dict[str, Any], name: str) -> File:
    if info["size"] is None:
        raise OSError(f"{address}: the server does not say how long it is; copy it to a local folder")
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), str(info["size"]))
    return File(name, address, info["size"], version)


@contextmanager
def _failures() -> Iterator[None]:
    """What the libraries raise for a server or a network that fails, as one of ours, in one line."""
    try:
        yield
    except Unreachable:
        raise
    except _raised() as error:
        reason: BaseException | None = error
        cause = error.__cause__
        if isinstance(error, FileNotFoundError) and isinstance(cause, (TimeoutError, *_named("aiohttp"))):
            reason = cause  # whatever fails, fsspec 2026.9 over http says that the file is not found
        status = getattr(reason, "status", None)
        text = " ".join(f"{type(reason).__name__}: {str(reason) or 'no bytes came in time'}".split())[:200]
        if status in (404, 410) or (status is None and isinstance(reason, FileNotFoundError)):
            raise Missing(text) from None
        if status == 416:
            raise Ended(text) from None
        if status in (401, 403) or isinstance(reason, PermissionError):
            raise Refused(text) from None
        raise Unreachable(text) from None


def _raised() -> tuple[type[Exception], ...]:
    return OSError, *_named("aiohttp", "botocore", "google", "gcsfs")


def _named(*libraries: str) -> tuple[type[Exception], ...]:
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
