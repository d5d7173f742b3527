"""Write a safetensors file one tensor at a time. Files are read with the safetensors library.

To write a file, the library needs all its tensors in memory, which the format does not require. A file consists of the header's
length in eight bytes, a JSON header with names, dtypes and shapes, and the tensors' bytes in the header's order, without gaps.
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
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK_BYTES = 1 << 24


class TensorSpec(NamedTuple):
    """A tensor's entry in the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor], *,
    on_chunk: Callable[[memoryview], object] = lambda chunk: None,
) -> int:  # fmt: skip
    """Write `tensors` to a new file, sync it, and return its size in bytes. `specs` describes them in the same order.

    Takes each tensor from the iterable after the previous one is written and released. Calls `on_chunk` with each
    chunk of bytes after it is written, for example to update a hash.
    Note: wider dtypes must come first, so that every tensor is aligned.
    """
    assert sys.byteorder == "little", "the format is little-endian, and bytes are written in memory order"
    tensor_iterator = iter(tensors)
    # Mode x fails if the file exists, so a process that was suspended cannot overwrite newer files.
    with open(path, "xb") as file:
        _write_chunks(file, memoryview(_header(specs)), on_chunk)
        for name, spec in specs.items():
            _write_chunks(file, _tensor_bytes(name, spec, next(tensor_iterator)), on_chunk)
        assert next(tensor_iterator, None) is None, f"{path}: more tensors than names"
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def group_by_bytes(items: Iterable[T], num_bytes: Callable[[T], int], max_bytes: int) -> list[list[T]]:
    """Split the items, in order, into groups of at most `max_bytes` bytes. A larger item forms its own group."""
    groups: list[list[T]] = [[]]
    group_bytes = 0
    for item in items:
        size = num_bytes(item)
        if groups[-1] and group_bytes + size > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(item)
        group_bytes += size
    return groups


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Source: README of the safetensors project, "Format"."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        assert start % spec.dtype.itemsize == 0, f"{name} would not be aligned"
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # the data starts at a multiple of eight bytes
    return len(header_bytes).to_bytes(8, "little") + header_bytes


def _tensor_bytes(name: str, spec: TensorSpec, tensor: Tensor) -> memoryview:
    actual_spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
    assert actual_spec == spec, f"{name}: is {actual_spec}, but its entry in specs is {spec}"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_chunks(file: BinaryIO, data: memoryview, on_chunk: Callable[[memoryview], object]) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        file.write(chunk)
        on_chunk(chunk)
