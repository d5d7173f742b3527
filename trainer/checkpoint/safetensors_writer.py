"""A safetensors file, written one tensor at a time; reading is the library's.

The library writes a file from all of its tensors at once. The format does not ask for that: eight bytes of length and a JSON
table of names, dtypes and shapes, all known beforehand, then the tensors' bytes in the order of the table, without holes.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK_BYTES = 1 << 24


class Spec(NamedTuple):
    """What the table says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[Tensor],
    *,
    watch: Callable[[memoryview], object] = lambda chunk: None,
) -> int:
    """The new file holds `tensors`, named and described by `specs` in the same order, and is synced; returns its size in bytes.

    Each tensor is asked for when the one before has been written and let go. `watch` is shown every byte, in order: the
    `update` of a hash.
    Note: wider dtypes come first, so that every tensor is aligned.
    """
    assert sys.byteorder == "little", "the format is little-endian, and bytes are written as they lie in memory"
    produced = iter(tensors)
    with open(path, "xb") as file:  # a process that was long asleep must not write into what others have made since
        _put(file, memoryview(_head(specs)), watch)
        for name, spec in specs.items():
            _put(file, _bytes(name, spec, next(produced)), watch)
        assert next(produced, None) is None, f"{path}: more tensors than names"
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def runs(items: Iterable[T], num_bytes: Callable[[T], int], limit: int) -> list[list[T]]:
    """The items in order, in runs of at most `limit` bytes; a larger item is alone."""
    found: list[list[T]] = [[]]
    used = 0
    for item in items:
        size = num_bytes(item)
        if found[-1] and used + size > limit:
            found.append([])
            used = 0
        found[-1].append(item)
        used += size
    return found


def _head(specs: Mapping[str, Spec]) -> bytes:
    """Source: README of the safetensors project, "Format"."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        assert start % spec.dtype.itemsize == 0, f"{name} would not be aligned"
        table[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on eight bytes
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, spec: Spec, tensor: Tensor) -> memoryview:
    found = Spec(tensor.dtype, tuple(tensor.shape))
    assert found == spec, f"{name}: {found} where {spec} was announced"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _put(file: BinaryIO, data: memoryview, watch: Callable[[memoryview], object]) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        file.write(chunk)
        watch(chunk)
