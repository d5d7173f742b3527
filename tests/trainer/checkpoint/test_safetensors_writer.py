"""A file written one tensor at a time can be read by the library and equals the one it would write."""

import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec, group_by_bytes, write_safetensors


def tensors() -> dict[str, torch.Tensor]:
    """Make tensors in the library's order: wider dtypes first, then names. One is not contiguous, one is empty."""
    return {
        "a": torch.randn(7, 3),
        "b.c": torch.randn(4, 5).t(),
        "scalar": torch.tensor(3.0),
        "é": torch.randn(0, 2),
        "bf16": torch.randn(3, 3).bfloat16(),
        "odd": torch.randn(5).bfloat16(),
    }


def specs(given: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}


def test_the_library_reads_the_same_tensors(tmp_path: Path) -> None:
    given = tensors()
    write_safetensors(tmp_path / "file", specs(given), given.values())
    found = load_file(tmp_path / "file")
    assert specs(found) == specs(given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    given = {name: tensor.contiguous() for name, tensor in tensors().items()}
    write_safetensors(tmp_path / "ours", specs(given), given.values())
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (split(tmp_path / name) for name in ("ours", "theirs"))
    assert ours == theirs


def split(path: Path) -> tuple[dict, bytes]:
    """Split a file into header and data; the data starts at a multiple of eight bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % 8 == 0
    return json.loads(content[8:end]), content[end:]


def test_size_and_hash_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "CHUNK_BYTES", 16)
    given, digest = tensors(), hashlib.sha256()
    size = write_safetensors(tmp_path / "file", specs(given), given.values(), on_chunk=digest.update)
    content = (tmp_path / "file").read_bytes()
    assert (size, digest.digest()) == (len(content), hashlib.sha256(content).digest())


def test_a_tensor_is_gone_before_the_next_is_asked_for(tmp_path: Path) -> None:
    described, last = {str(index): TensorSpec(torch.float32, (100,)) for index in range(4)}, []

    def made() -> Iterator[torch.Tensor]:
        for _ in described:
            assert all(reference() is None for reference in last)
            yield one()

    def one() -> torch.Tensor:
        tensor = torch.randn(100)
        last.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "file", described, made())
    assert len(last) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(3)], r"is .*\(3,\).*, but its entry in specs is .*\(2,\)"),
        ([torch.ones(2), torch.ones(2)], "more tensors than names"),
    ],
)
def test_tensors_that_are_not_the_announced_ones_are_refused(given: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        write_safetensors(tmp_path / "file", {"a": TensorSpec(torch.float32, (2,))}, given)


def test_a_narrow_tensor_may_not_put_a_wide_one_out_of_line(tmp_path: Path) -> None:
    described = {"odd": TensorSpec(torch.bfloat16, (1,)), "wide": TensorSpec(torch.float32, (1,))}
    with pytest.raises(AssertionError, match="wide would not be aligned"):
        write_safetensors(tmp_path / "file", described, [torch.ones(1).bfloat16(), torch.ones(1)])


def test_runs_keep_order_and_limit() -> None:
    assert group_by_bytes([3, 3, 5, 9, 1, 1], lambda item: item, 6) == [[3, 3], [5], [9], [1, 1]]
    assert group_by_bytes([], len, 6) == [[]]


def test_a_file_that_is_there_is_not_written_into(tmp_path):
    """A process that was suspended may find a newer, committed file of the same name."""
    path = tmp_path / "file"
    path.write_text("committed")
    with pytest.raises(FileExistsError):
        safetensors_writer.write_safetensors(path, {}, [])
    assert path.read_text() == "committed"
