"""Write and read the files of unfinished work, so that a damaged one is found before it can change the corpus.

A *record* is a JSON file that states that something is finished. It contains its own hash, which depends on its name, so that
neither a changed byte nor the record of another unit is taken for it. Arrays have no hash of their own; the record of the
unit or shard that they belong to has it. Nothing damaged is replaced silently: the message names what to remove.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from xxhash import xxh3_128

from tandem.trainer.config import UserError, parse_content
from tandem.trainer.config.constraints import Pattern
from tandem.trainer.config.outside import NotAFile, check_regular_file, open_regular_file, parse_json, read_file
from tandem.trainer.data.manifest import one_line
from tandem.trainer.disk import atomic_write

XXH3_128 = Pattern(r"[0-9a-f]{32}", "an XXH3-128 in hexadecimal")
Record = TypeVar("Record")


class DamagedWork(UserError):
    """A file of unfinished work is missing or damaged. Nothing is removed, because the message says what to remove."""


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass with its hash."""
    content = dataclasses.asdict(record)
    atomic_write(path, json.dumps({"sha256": _hash(path, content), "content": content}))


def read_record(path: Path, record_type: type[Record], remedy: str | None = None) -> Record:
    """Read a record. `remedy` says what to do if it is damaged; by default it is to be removed.

    Raises: DamagedWork if any value, key or type differs from what was written under this name.
    """
    remedy = remedy or f"remove {path} and run the same command again"
    try:
        tree = parse_json(read_file(path))
        sha256, content = tree.pop("sha256"), tree.pop("content")
        if tree or sha256 != _hash(path, content):
            raise ValueError("it does not match its hash")
        return parse_content(record_type, content, path, remedy)
    except NotAFile as error:
        raise DamagedWork(f"{error}; {remedy}") from None
    except UserError as error:
        raise DamagedWork(str(error)) from None
    except OSError as error:
        raise DamagedWork(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedWork(f"{path}: is damaged or of another version ({one_line(error)}); {remedy}") from None


def file_hash(path: Path) -> str:
    """Return the XXH3-128 of a file.  Raises: OSError."""
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def check_file(path: Path, remedy: str, *, size_bytes: int | None = None, xxh3_hash: str | None = None) -> None:
    """Raises: DamagedWork if the file is missing, or has another size or hash."""
    try:
        found_bytes = path.stat().st_size
        if size_bytes is not None and found_bytes != size_bytes:
            raise DamagedWork(f"{path}: has {found_bytes} bytes, not {size_bytes} as when it was written; {remedy}")
        if xxh3_hash is not None and file_hash(path) != xxh3_hash:
            raise DamagedWork(f"{path}: has changed since it was written; {remedy}")
    except NotAFile as error:
        raise DamagedWork(f"{error}; {remedy}") from None
    except OSError as error:
        raise DamagedWork(f"{path}: cannot be read ({error.strerror}); {remedy}") from None


def map_array(path: Path, dtype: np.typing.DTypeLike, remedy: str) -> np.ndarray:
    """Map an array that `np.save` has written.  Raises: DamagedWork if its header or its size is wrong."""
    try:
        check_regular_file(path)
        array: np.ndarray = np.load(path, mmap_mode="r")
        if array.dtype != dtype or path.stat().st_size != array.offset + array.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"its header states {array.dtype} {array.shape}")
        return array
    except NotAFile as error:
        raise DamagedWork(f"{error}; {remedy}") from None
    except OSError as error:
        raise DamagedWork(f"{path}: cannot be read ({error.strerror or one_line(error)}); {remedy}") from None
    except Exception as error:  # numpy evaluates the header, so damage there raises errors of many kinds
        raise DamagedWork(f"{path}: is damaged ({one_line(error)}); {remedy}") from None


def _hash(path: Path, content: Any) -> str:
    return hashlib.sha256(f"{path.name}\0{json.dumps(content, sort_keys=True)}".encode()).hexdigest()
