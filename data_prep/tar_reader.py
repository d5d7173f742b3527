"""Read documents, or samples of token ids, from webdataset tars, and refuse tars that webdataset would misread.

These tars are inputs of `tandem prepare`. The shards of a finished corpus have another reader, in `tandem audit`.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format as npy_format

from tandem.data_prep.executor import ProgressCallback
from tandem.data_prep.input_files import READ_BLOCK_BYTES, SAMPLE_MANIFEST_FILE, FilePart
from tandem.data_prep.records import (
    Document,
    decompress,
    describe_decode_error,
    open_unchanged,
    parse_json,
    parse_record,
    printable,
)
from tandem.trainer.config import UserError

TEXT_EXTENSIONS = ("txt", "json", "jsonl")
"""What members of a tar hold text, each also with .gz."""
TOKEN_EXTENSIONS = ("json.gz", "json", "txt", "npy")
"""What members of a tokenised tar hold ids: a JSON list, or a NumPy array."""
MAX_MEMBER_BYTES = 2 << 30
"""Limit of a member after decompression: a worker holds it in memory."""
PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LONG_NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
TYPES_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
)  # fmt: skip
MAX_PAX_BYTES = 1 << 20
"""Limit of the pax records of a member, which are held in memory."""
OTHER_MEMBERS = "other_members"
"""Name of the count of members of a tar that are not read."""


def read_tar(
    part: FilePart,
    stream: BinaryIO,
    text_field: str,
    extra_fields: list[str],
    advance: ProgressCallback,
    counts: Counter[str],
) -> Iterator[Document]:
    """Yield the documents of the samples of a tar, which is open in `stream`.

    Each .txt member is a document. A .json member of the same name, or KEY.json of a sample with .txt members, only
    holds fields. Each other .json member and each line of a .jsonl member is a document.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander  # imports torch

    tar = _TarStream(part, stream, advance, counts)
    address, name = part.file.address, part.file.name

    def select(member_name: str) -> bool:
        key, extension = base_plus_ext(member_name)
        if not tar.count_unless(key is not None and _text_kind(extension) is not None):
            return False
        tar.check_member(key, extension.lower(), member_name)
        return True

    members = tar_file_expander([{"url": address, "stream": tar}], select_files=select)
    for sample in tar.iterate(group_by_keys(members)):
        key = sample["__key__"]
        extensions = [one for one in sample if not one.startswith("__")]
        stems = {_stem(one) for one in extensions if _text_kind(one) == "txt"}
        for extension in extensions:
            kind = _text_kind(extension)
            if kind == "json" and stems and (_stem(extension) in stems or not _stem(extension)):
                continue
            member = f"{key}.{extension}"
            try:
                data = _gunzip(sample[extension], extension)
                if kind == "txt":
                    fields = _sample_fields(sample, extension) if extra_fields else {}
                    yield Document(f"{name}:{member}", data.decode(), fields)
                elif kind == "json":
                    record = parse_record(data, text_field)
                    yield Document(f"{name}:{member}", record.pop(text_field), record)
                else:
                    for number, line in enumerate(data.split(b"\n"), 1):
                        if line.strip():
                            member = f"{key}.{extension}:{number}"
                            record = parse_record(line, text_field)
                            yield Document(f"{name}:{member}", record.pop(text_field), record)
            except Exception as error:  # a damaged member can raise anything
                raise _member_error(address, member, error) from None


def read_token_samples(
    part: FilePart, extension: str, advance: ProgressCallback, counts: Counter[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the ids of each sample of a tokenised tar: of every member with this extension.

    Samples may share a name, because open_lm names them by a hash of their ids and can write a sample several times.
    Raises: UserError naming the file and the member that cannot be read.
    """
    from webdataset.tariterators import tar_file_iterator  # imports torch, which takes a second and 200 MB

    file, num_samples = part.file, 0
    with open_unchanged(part) as stream:
        tar = _TarStream(part, stream, advance, counts)

        def select(name: str) -> bool:
            return tar.count_unless(name.lower().endswith(f".{extension}"))

        for member in tar.iterate(tar_file_iterator(tar, select_files=select)):
            try:
                ids = _parse_ids(member["data"], extension)
            except Exception as error:  # a damaged member can raise anything
                raise _member_error(file.address, member["fname"], error) from None
            yield member["fname"], ids
            num_samples += 1
    if file.num_samples not in (None, num_samples):
        raise UserError(
            f"{file.address}: has {num_samples} samples, but {SAMPLE_MANIFEST_FILE} states {file.num_samples}; "
            "download it again"
        )


class _TarStream:
    """The bytes of a tar on their way to webdataset, checked.

    webdataset reads with tarfile, which takes a damaged header, or a file cut between two members, for the end of the
    tar. So this follows the headers and raises if the tar does not end with a block of zeros and only zeros after it.
    """

    def __init__(self, part: FilePart, stream: BinaryIO, advance: ProgressCallback, counts: Counter[str]):
        self.part, self._file = part, stream
        self._stream = decompress(stream, part.file.compression)
        self._advance, self._counts, self._reported_bytes = advance, counts, 0
        self._header, self._bytes_to_next_header = bytearray(), 0
        self._pax_data: bytearray | None = None
        self._pax_size: int | None = None
        self._member, self._has_ended = "", False
        self._num_members, self._num_offered = 0, 0
        self._fault = ""
        self._keys: set[str] = set()
        self._key, self._extensions = "", set[str]()

    def read(self, size: int) -> bytes:
        """Called by tarfile."""
        try:
            block = self._stream.read(size)
            self._follow(memoryview(block))
        except OSError as error:
            raise self._fail(
                f"cannot be read after member {self._member!r} ({' '.join(str(error).split())[:200]})"
            ) from None
        return block

    def iterate(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield what webdataset makes of this stream, then read the rest; raise the first fault as a UserError."""
        try:
            yield from samples
            while self.read(READ_BLOCK_BYTES):
                pass
        except Exception as error:  # tarfile raises also RecursionError, MemoryError and EOFError
            if not self._fault:
                self._fail(f"cannot be read at member {self._member!r} ({_describe(error)})")
            # A new error: webdataset appends to the arguments of every exception that passes through it.
            raise UserError(self._fault) from None
        if dropped := self._num_members - self._num_offered:  # links, and names that webdataset reserves
            self._counts[OTHER_MEMBERS] += dropped
        self._advance(self.part.size_bytes - self._reported_bytes)

    def count_unless(self, is_wanted: bool) -> bool:
        """Return whether a member is wanted; count it if not. Called for each member that webdataset does not drop."""
        self._num_offered += 1
        if not is_wanted:
            self._counts[OTHER_MEMBERS] += 1
        position_bytes = self._file.tell()
        if position_bytes - self._reported_bytes >= READ_BLOCK_BYTES:
            self._advance(position_bytes - self._reported_bytes)
            self._reported_bytes = position_bytes
        return is_wanted

    def check_member(self, key: str, extension: str, name: str) -> None:
        """Refuse a second member with the same name, and a sample whose members are not adjacent."""
        if key != self._key:
            if key in self._keys:
                raise self._fail(
                    f"{printable(name)}: the sample {key!r} occurred before; give each sample a unique key and keep "
                    "its members together, as tar --sort=name does"
                )
            self._keys.add(key)
            self._key, self._extensions = key, set()
        if extension in self._extensions:
            raise self._fail(f"{printable(name)}: occurs twice; give each sample a unique key")
        self._extensions.add(extension)

    def _follow(self, block: memoryview) -> None:
        if not block and not self._has_ended:
            raise self._fail(f"is truncated at member {self._member!r}; restore or leave out the file")
        while block:
            if self._has_ended:
                if bytes(block).strip(b"\0"):
                    raise self._fail("continues after its end, as concatenated tars do; split it into separate tars")
                return
            if self._bytes_to_next_header:
                passed = min(self._bytes_to_next_header, len(block))
                self._bytes_to_next_header -= passed
                if self._pax_data is not None:
                    self._pax_data += block[:passed]
                    if not self._bytes_to_next_header:
                        self._read_pax_records()
            else:
                passed = min(tarfile.BLOCKSIZE - len(self._header), len(block))
                self._header += block[:passed]
                if len(self._header) == tarfile.BLOCKSIZE:
                    self._read_header()
            block = block[passed:]

    def _read_header(self) -> None:
        header = bytes(self._header)
        self._header.clear()
        if not header.strip(b"\0"):
            self._has_ended = True
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            state = f"is damaged after member {self._member!r}" if self._member else "is not a tar"
            raise self._fail(f"{state} ({error}); restore or leave out the file") from None
        self._member, size = member.name, member.size
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise self._fail_sparse()
        if member.type in PAX_TYPES:
            self._pax_data = bytearray()
        elif member.type not in LONG_NAME_TYPES:
            size, self._pax_size = size if self._pax_size is None else self._pax_size, None
            self._num_members += member.type != tarfile.DIRTYPE
        if size < 0 or (member.type in PAX_TYPES and not 0 < size <= MAX_PAX_BYTES):
            raise self._fail(
                f"is damaged at member {self._member!r} (its size is {size:,}); restore or leave out the file"
            )
        if member.type not in TYPES_WITHOUT_DATA:
            self._bytes_to_next_header = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _read_pax_records(self) -> None:
        """Apply the pax records that change how a member is stored: its size, or that it is sparse."""
        data, self._pax_data = bytes(self._pax_data or b""), None
        while (found := re.match(rb"(\d{1,7}) ([^=]+)=", data)) and (length := int(found[1])) > found.end():
            keyword, value = found[2], data[found.end() : length - 1]
            if keyword.startswith(b"GNU.sparse."):
                raise self._fail_sparse()
            if keyword == b"size":
                if not re.fullmatch(rb"\d{1,18}", value):
                    raise self._fail(
                        f"is damaged at member {self._member!r} (its pax size is {value[:40]!r}); restore it"
                    )
                self._pax_size = int(value)
            data = data[length:]

    def _fail_sparse(self) -> UserError:
        return self._fail(f"has a sparse member, {self._member!r}; write the tar without --sparse")

    def _fail(self, message: str) -> UserError:
        self._fault = self._fault or f"{self.part.file.address}: {message}"
        return UserError(self._fault)


def _text_kind(extension: str) -> str | None:
    """Which of TEXT_EXTENSIONS a member with this extension is, if any: only the last suffix counts."""
    kind = extension.lower().removesuffix(".gz").rpartition(".")[2]
    return kind if kind in TEXT_EXTENSIONS else None


def _stem(extension: str) -> str:
    """The part of an extension that a .txt member and the .json member with its fields have in common."""
    return extension.removesuffix(".gz").rpartition(".")[0]


def _member_error(address: str, member: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{address}: {printable(member)}: is not UTF-8 ({describe_decode_error(error)}); convert it")
    return UserError(f"{address}: {printable(member)}: {_describe(error)}")


def _describe(error: Exception) -> str:
    """The text of an error as one line, without the objects that webdataset appends to it; else the name of its type."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0] if error.args else None
    text = text.partition(" @ <")[0] if isinstance(text, str) else ""
    return " ".join(text.split())[:300] or type(error).__name__


def _sample_fields(sample: dict[str, Any], extension: str) -> dict[str, Any]:
    """The record beside a .txt member: the .json of the same name, else that of the sample."""
    stem = _stem(extension)
    prefix = f"{stem}." if stem else ""
    for json_extension in (f"{prefix}json", f"{prefix}json.gz", "json", "json.gz"):
        if json_extension in sample:
            record = parse_json(_gunzip(sample[json_extension], json_extension))
            return record if isinstance(record, dict) else {}
    return {}


def _gunzip(data: bytes, extension: str) -> bytes:
    if not extension.endswith(".gz"):
        return data
    if not data:
        raise EOFError("is truncated: a compressed member is not empty even if it has no text")
    pieces, num_bytes = [], 0
    while data:
        gzip_member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        pieces.append(gzip_member.decompress(data, MAX_MEMBER_BYTES - num_bytes + 1))
        num_bytes += len(pieces[-1])
        if num_bytes > MAX_MEMBER_BYTES:
            raise ValueError(f"holds more than {MAX_MEMBER_BYTES:,} bytes after decompression; split it")
        if not gzip_member.eof:
            raise EOFError("is truncated: the compressed data has no end; restore it")
        data = gzip_member.unused_data.lstrip(b"\0")
    return b"".join(pieces)


def _parse_ids(data: bytes, extension: str) -> np.ndarray:
    """The ids of a sample as a one-dimensional array of integers.

    Raises: ValueError, or what decompression raises, if it is anything else.
    """
    if extension == "npy":
        ids = _parse_npy(data)
    else:
        values = parse_json(_gunzip(data, extension))
        ids = np.empty(0, np.int64) if values == [] else np.array(values)
    _check_kind(ids.dtype, ids.ndim)
    return ids


def _check_kind(dtype: np.dtype, num_dimensions: int) -> None:
    if num_dimensions != 1 or dtype.kind not in "iu":
        raise ValueError(f"is {dtype} of {num_dimensions} dimensions; must be one list of whole numbers")


def _parse_npy(data: bytes) -> np.ndarray:
    """View the data of a .npy file as an array. Its header is checked first, because np.load allocates what it states."""
    if not data.startswith(npy_format.MAGIC_PREFIX):
        raise ValueError("is not a .npy file; write it with numpy.save, or restore it")
    stream = io.BytesIO(data)
    try:
        is_first_version = npy_format.read_magic(stream) == (1, 0)
        read_header = npy_format.read_array_header_1_0 if is_first_version else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:  # numpy evaluates the header as Python text
        raise ValueError(f"has a damaged header ({_describe(error)}); restore it") from None
    _check_kind(dtype, len(shape))
    start = stream.tell()
    if shape[0] * dtype.itemsize != len(data) - start:
        raise ValueError(
            f"has {len(data) - start:,} bytes of data, but its header states {shape[0]:,} x {dtype.itemsize}; restore it"
        )
    return np.ndarray(shape, dtype, data, start)
