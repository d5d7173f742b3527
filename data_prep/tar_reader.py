"""Read documents, or samples of token ids, from webdataset tars, and refuse tars that webdataset would misread.

These tars are inputs of `tandem prepare`. The shards of a finished corpus have another reader, in `tandem audit`.
"""

import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format as npy_format

from tandem.data_prep.decompression import READ_BLOCK_BYTES, decompress
from tandem.data_prep.executor import ItemCancelled, ProgressCallback
from tandem.data_prep.input_files import SAMPLE_MANIFEST_FILE, FilePart, unreadable_error
from tandem.data_prep.json_values import parse_json
from tandem.data_prep.records import (
    MAX_RECORD_BYTES,
    BadRecord,
    BadRecords,
    Document,
    check_text,
    describe_decode_error,
    open_unchanged,
    parse_record,
    printable,
)  # fmt: skip
from tandem.trainer.config import UserError

TEXT_EXTENSIONS = ("txt", "json", "jsonl")
"""Extensions of members that contain text, each also with .gz."""
TOKEN_EXTENSIONS = ("json.gz", "json", "txt", "npy")
"""Extensions of members that contain ids: a JSON list, or a NumPy array."""
MAX_MEMBER_BYTES = MAX_RECORD_BYTES
"""Limit of a member after its own decompression."""
PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
"""Types of headers that extend the next header. tarfile holds their data in memory."""
MAX_PAX_BYTES = 1 << 20
RESERVED_NAME = re.compile(r"__[^/]*__($|/)")
"""Matches the names of members that webdataset skips."""


def read_tar(
    part: FilePart, stream: BinaryIO, text_field: str, extra_fields: list[str], advance: ProgressCallback,
    counts: Counter[str], bad: BadRecords,
) -> Iterator[Document]:  # fmt: skip
    """Yield the documents of the samples of a tar, which is open in `stream`.

    Each .txt member is a document. A .json member of the same name, or KEY.json of a sample with .txt members, only
    holds fields. Each other .json member and each line of a .jsonl member is a document.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys  # imports torch, which takes a second and 200 MB

    def is_wanted(member: str) -> bool:
        key, extension = base_plus_ext(member)
        return key is not None and _text_kind(extension) is not None

    name = part.file.name
    members = _read_members(part, stream, is_wanted, advance, counts)
    for sample in group_by_keys(_check_keys(part, members, base_plus_ext)):
        extensions = [one for one in sample if not one.startswith("__")]
        stems = {_stem(one) for one in extensions if _text_kind(one) == "txt"}
        for extension in extensions:
            kind = _text_kind(extension)
            if kind == "json" and stems and (_stem(extension) in stems or not _stem(extension)):
                continue
            place = member = f"{sample['__key__']}.{extension}"
            try:
                data = _gunzip(sample[extension], extension)
                if kind == "txt":
                    fields = _sample_fields(sample, extension) if extra_fields else {}
                    decoded = data.decode()
                    check_text(decoded)
                    yield Document(f"{name}:{member}", decoded, fields)
                    continue
                lines = (
                    (f"{member}:{number}", line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()
                )
                for place, text in lines if kind == "jsonl" else [(member, data)]:
                    try:
                        document = Document(f"{name}:{place}", *parse_record(text, text_field))
                    except BadRecord as error:
                        bad.add(error, lambda: f": {printable(place)}")  # noqa: B023
                        continue
                    bad.add_good()
                    yield document
            except UserError:
                raise
            except Exception as error:  # a damaged member can raise anything
                raise _member_error(part, place, error) from None


def read_token_samples(
    part: FilePart, extension: str, advance: ProgressCallback, counts: Counter[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the ids of each sample of a tokenized tar: of every member with this extension.

    Samples may share a name, because open_lm names them by a hash of their ids and can write a sample several times.

    Raises: UserError naming the file and the member that cannot be read.
    """
    file, num_samples = part.file, 0
    with open_unchanged(part) as stream:
        members = _read_members(part, stream, lambda name: name.lower().endswith(f".{extension}"), advance, counts)
        for member in members:
            num_samples += 1
            try:
                ids = _parse_ids(member["data"], extension)
            except Exception as error:  # a damaged member can raise anything
                raise _member_error(part, member["fname"], error) from None
            yield member["fname"], ids
    if file.num_samples not in (None, num_samples):
        raise UserError(
            f"{file.address}: has {num_samples} samples, but {SAMPLE_MANIFEST_FILE} states {file.num_samples}; "
            "download it again"
        )


class _DamagedHeader(Exception):
    """A damaged header. It is not a `tarfile.HeaderError`, because tarfile takes those for the end of the tar."""


class _StrictHeader(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in PAX_TYPES and not 0 < header.size <= MAX_PAX_BYTES):
            raise _DamagedHeader(f"the size of {header.name!r} is {header.size:,}")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the end of the tar
        except tarfile.HeaderError as error:  # of a header, or of the pax records that extend it
            raise _DamagedHeader(error) from None


class _TarBytes:
    """The file that tarfile reads. It raises EOFError at its end, unless `may_end` is set, because tarfile would take a file
    that was cut between two members for a whole tar.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self.may_end = stream, False

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        if not block and not self.may_end:
            raise EOFError
        return block


def _read_members(
    part: FilePart, stream: BinaryIO, is_wanted: Callable[[str], bool], advance: ProgressCallback, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the wanted members in the form of webdataset's `tar_file_iterator`, and count all others except folders.

    Raises: UserError if the tar is damaged, does not end with a block of zeros, or has other bytes after it.
    """
    address, name, reported_bytes = part.file.address, "", 0
    try:
        source: Any = _TarBytes(decompress(stream, part.file.compression))
        tar: Any
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_StrictHeader) as tar:
            for member in iter(tar.next, None):
                name = member.name
                _check_storage(part, member)
                if member.isreg() and not RESERVED_NAME.match(name) and is_wanted(name):
                    if member.size > MAX_RECORD_BYTES:
                        size = f"has {member.size:,} bytes, more than {MAX_RECORD_BYTES:,}"
                        raise UserError(f"{address}: {printable(name)}: {size}; split it")
                    yield {"fname": name, "data": tar.extractfile(member).read(), "__url__": address}
                elif not member.isdir():
                    counts["other_members"] += 1
                tar.members.clear()
                if stream.tell() - reported_bytes >= READ_BLOCK_BYTES:
                    advance(stream.tell() - reported_bytes)
                    reported_bytes = stream.tell()
            source.may_end = True
            while rest := tar.fileobj.read(READ_BLOCK_BYTES):
                if rest.strip(b"\0"):
                    raise UserError(
                        f"{address}: continues after its end, as concatenated tars do; split it into separate tars"
                    )
    except (UserError, ItemCancelled):
        raise
    except EOFError:
        place = f"at member {name!r}" if name else "at its beginning"
        raise UserError(f"{address}: is truncated {place}; restore or leave out the file") from None
    except _DamagedHeader as error:
        state = f"is damaged after member {name!r}" if name else "is not a tar, or its first header is damaged"
        raise UserError(f"{address}: {state} ({error}); restore or leave out the file") from None
    except Exception as error:  # tarfile also raises RecursionError, ValueError and MemoryError
        raise unreadable_error(address, error, f" after member {name!r}" if name else " at its beginning") from None
    advance(part.size_bytes - reported_bytes)


def _check_storage(part: FilePart, member: tarfile.TarInfo) -> None:
    """Raises: UserError if the member is sparse or its pax record of its size is not a number."""
    if member.issparse() or any(keyword.startswith("GNU.sparse.") for keyword in member.pax_headers):
        raise UserError(f"{part.file.address}: has a sparse member, {member.name!r}; write the tar without --sparse")
    if not (size := member.pax_headers.get("size", "0")).isdecimal():
        raise UserError(
            f"{part.file.address}: is damaged at member {member.name!r} (its pax size is {size[:40]!r}); restore it"
        )


def _check_keys(
    part: FilePart, members: Iterator[dict[str, Any]], base_plus_ext: Callable[[str], tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Pass the members on. Refuse a second member of the same name, and a sample whose members are not adjacent."""
    keys: set[str] = set()
    current_key, extensions = "", set[str]()
    for member in members:
        key, extension = base_plus_ext(member["fname"])
        place = f"{part.file.address}: {printable(member['fname'])}"
        if key != current_key:
            if key in keys:
                raise UserError(
                    f"{place}: the sample {key!r} occurred before; give each sample a unique key and keep its members "
                    "together, as tar --sort=name does"
                )
            keys.add(key)
            current_key, extensions = key, set()
        if extension.lower() in extensions:
            raise UserError(f"{place}: occurs twice; give each sample a unique key")
        extensions.add(extension.lower())
        yield member


def _text_kind(extension: str) -> str | None:
    """Return which of TEXT_EXTENSIONS this is: its last suffix decides."""
    kind = extension.lower().removesuffix(".gz").rpartition(".")[2]
    return kind if kind in TEXT_EXTENSIONS else None


def _stem(extension: str) -> str:
    """Return the part that the extensions of a .txt member and of the .json member with its fields share."""
    return extension.removesuffix(".gz").rpartition(".")[0]


def _member_error(part: FilePart, member: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError):
        fault = f"is not UTF-8 ({describe_decode_error(error)}); convert it"
    elif isinstance(error, ValueError):  # raised here or by the parsers of `records`
        fault = _describe(error)
    else:
        fault = f"cannot be read ({_describe(error)}); restore it"
    return UserError(f"{part.file.address}: {printable(member)}: {fault}")


def _describe(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _sample_fields(sample: dict[str, Any], extension: str) -> dict[str, Any]:
    """Return the record of a .txt member: the .json of the same name, else that of the sample."""
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
        raise ValueError(
            "is truncated: it has no bytes, but even the compressed form of an empty text has some; restore it"
        )
    pieces, num_bytes = [], 0
    while data:
        gzip_member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        pieces.append(gzip_member.decompress(data, MAX_MEMBER_BYTES - num_bytes + 1))
        num_bytes += len(pieces[-1])
        if num_bytes > MAX_MEMBER_BYTES:
            raise ValueError(f"contains more than {MAX_MEMBER_BYTES:,} bytes after decompression; split it")
        if not gzip_member.eof:
            raise ValueError("is truncated: the compressed data stops before its end marker; restore it")
        data = gzip_member.unused_data.lstrip(b"\0")
    return b"".join(pieces)


def _parse_ids(data: bytes, extension: str) -> np.ndarray:
    """Return the ids of a sample, which must be a one-dimensional array of integers."""
    if extension != "npy":
        values = parse_json(_gunzip(data, extension))
        ids = np.empty(0, np.int64) if values == [] else np.array(values)
        _check_kind(ids.shape, ids.dtype)
        return ids
    if not data.startswith(npy_format.MAGIC_PREFIX):
        raise ValueError("is not a .npy file; write it with numpy.save, or restore it")
    stream = io.BytesIO(data)
    try:
        version = npy_format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"unknown version {version}")
        is_first_version = version == (1, 0)
        read_header = npy_format.read_array_header_1_0 if is_first_version else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:  # numpy evaluates the header as Python text
        raise ValueError(f"has a damaged header ({_describe(error)}); restore it") from None
    _check_kind(shape, dtype)
    num_bytes = len(data) - stream.tell()
    if shape[0] * dtype.itemsize != num_bytes:  # checked first, because np.load allocates what the header states
        raise ValueError(
            f"has {num_bytes:,} bytes of data, but its header states {shape[0]:,} x {dtype.itemsize}; restore it"
        )
    return np.ndarray(shape, dtype, data, stream.tell())


def _check_kind(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"is not one list of whole numbers ({dtype} in {len(shape)} dimensions); correct the member")
