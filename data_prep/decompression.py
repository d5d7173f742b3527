"""Decompress streams: gzip, bz2, xz and zstd. A stream that ends before its end marker is an error, never a shorter text.

zlib, bz2 and lzma are used for themselves, because pyarrow has no xz and refuses the zeros that some tools write after a gzip
member. pyarrow decompresses zstd, because the zstandard package reads a truncated file as a shorter one.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import pyarrow

READ_BLOCK_BYTES = 4 << 20
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz"}
"""First bytes of compressed files. bz2 and the skippable frames of zstd have a variable byte, see `compression_of`."""
_START: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}
LONG_WINDOW_ERROR = "Frame requires too much memory"
"""Begins zstd's message about a window of more than 128 MiB, which `zstd --long=28` and above write."""


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file with these first bytes, None if it is not compressed."""
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bz2"
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a skippable frame, which pzstd writes first
        return "zstd"
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def decompress(stream: BinaryIO, compression: str | None) -> BinaryIO:
    """Return the decompressed stream. Its reads raise OSError if the data are damaged or truncated."""
    if compression is None:
        return stream
    return io.BufferedReader(_open(stream, compression, READ_BLOCK_BYTES), READ_BLOCK_BYTES)


def read_head(stream: BinaryIO, compression: str | None, num_bytes: int) -> bytes:
    """Return the first bytes after decompression: at most `num_bytes`, and fewer before a fault."""
    source, head = stream if compression is None else _open(stream, compression, num_bytes), b""
    with suppress(OSError):
        while len(head) < num_bytes and (block := source.read(num_bytes - len(head))):
            head += block
    return head


def _open(stream: BinaryIO, compression: str, block_bytes: int) -> Any:
    if compression == "zstd":
        return pyarrow.CompressedInputStream(stream, compression)
    return _Members(stream, _START[compression], block_bytes)


class _Members(io.RawIOBase):
    """Concatenated members, which zeros may follow."""

    mode = "rb"

    def __init__(self, stream: BinaryIO, start: Callable[[], Any], block_bytes: int):
        self._stream, self._start, self._block_bytes = stream, start, block_bytes
        self._member, self._pending = start(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(buffer):
            return 0
        while True:
            if self._member is None:
                while not self._pending.strip(b"\0"):
                    if not (block := self._stream.read(self._block_bytes)):
                        return 0
                    self._pending = block
                self._member, self._pending = self._start(), self._pending.lstrip(b"\0")
            try:
                data = self._member.decompress(self._pending, len(buffer))
            except (zlib.error, lzma.LZMAError) as error:
                raise OSError(str(error)) from None
            self._pending = getattr(self._member, "unconsumed_tail", b"")
            if self._member.eof:
                self._pending, self._member = self._member.unused_data, None
            elif not data and not self._pending:
                self._pending = self._stream.read(self._block_bytes)
                if not self._pending:
                    raise OSError("Truncated compressed stream")
            if data:
                buffer[: len(data)] = data
                return len(data)
