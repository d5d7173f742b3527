"""Any range of any rank's share can be read from a checkpoint of any layout."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.layout import FORMAT_VERSION, MANIFEST_FILE, fragment_key
from tandem.trainer.checkpoint.read import Checkpoint
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import UserError
from tandem.trainer.distributed.sharding import TensorSharding, slice_local

SHAPES = {"first": ((7, 5), 0), "second": ((6, 7), 1), "fused": ((2, 7, 3), 1), "whole": ((11,), None)}
"""Name -> unpadded shape and sharded dim. A size of 7 needs padding."""
NAME = "tensor"


def shard(name: str, tp_size: int, multiple: int) -> TensorSharding:
    """Shard over `tp_size` ranks, padded to a multiple of `multiple` on each."""
    shape, dim = SHAPES[name]
    unit = tp_size * multiple
    return TensorSharding(shape, dim, 0 if dim is None else -(-shape[dim] // unit) * unit)


def written(folder: Path, cut: TensorSharding, tp_size: int, full: Tensor, draw: random.Random) -> Checkpoint:
    """Write a checkpoint with fragments of random length and one file per rank."""
    folder.mkdir()
    tables = []
    for tp_rank in range(tp_size if cut.sharded_dim is not None else 1):
        box = slice_local(cut, full, tp_rank, tp_size).reshape(-1)
        ends = sorted({*draw.choices(range(1, len(box)), k=3), len(box)})
        entries, parts = [], []
        for start, end in zip([0, *ends], ends, strict=False):
            place = {"shape": list(cut.global_shape), "dim": cut.sharded_dim, "padded_size": cut.padded_size}
            entries.append({"name": NAME, "sharding": place, "tp_rank": tp_rank, "start": start, "numel": end - start,
                            "kinds": ["master"]})  # fmt: skip
            parts.append(box[start:end])
        specs = {
            fragment_key("master", NAME, entry["start"]): TensorSpec(torch.float32, (entry["numel"],))
            for entry in entries
        }
        file = f"rank-{tp_rank}.safetensors"
        size = safetensors_writer.write_safetensors(folder / file, specs, parts)
        tables.append({"file": file, "file_info": {"bytes": size, "sha256": ""}, "entries": entries})
    commit(folder, tables, {"step": 1, "tp_size": tp_size})
    return Checkpoint(folder)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_those_of_the_tensor(name, seed, tmp_path, generator):
    draw = random.Random(f"{name}{seed}")
    full = torch.randn(SHAPES[name][0], generator=generator)
    for number in range(6):
        tp_size, other = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3, 4])
        snapshot = written(tmp_path / str(number), shard(name, tp_size, draw.choice([1, 2, 5])), tp_size, full, draw)
        assert torch.equal(snapshot.read_tensor("master", NAME), full)
        cut = shard(name, other, draw.choice([1, 2, 5]))
        for tp_rank in range(other):
            box = slice_local(cut, full, tp_rank, other).reshape(-1)
            for start, end in [(0, len(box)), *(sorted(draw.sample(range(len(box) + 1), 2)) for _ in range(20))]:
                target = torch.full((end - start,), torch.nan)
                snapshot.read_local(target, "master", NAME, cut, tp_rank, other, start)
                assert torch.equal(target, box[start:end]), (number, tp_rank, start, end)


def test_a_checkpoint_with_a_hole_is_no_tensor(tmp_path, generator):
    full = torch.randn((7, 5), generator=generator)
    snapshot = written(tmp_path / "one", shard("first", 2, 1), 2, full, random.Random(1))
    del snapshot._fragments_by_name[NAME][1]
    with pytest.raises(AssertionError, match="do not cover it"):
        snapshot.read_tensor("master", NAME)


@pytest.mark.parametrize("number", [1, 3, None])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, number):
    manifest = {"step": 1, "fragments": [], "files": {}} | ({} if number is None else {"format": number})
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=rf"checkpoint format {number}, but this version of Tandem reads only {FORMAT_VERSION};"
    ):
        Checkpoint(tmp_path)


def test_a_shape_larger_than_the_files_is_refused_before_memory_is_taken(tmp_path, generator):
    full = torch.randn(SHAPES["whole"][0], generator=generator)
    written(tmp_path / "step", shard("whole", 1, 1), 1, full, random.Random(0))
    path = tmp_path / "step" / MANIFEST_FILE
    tree = json.loads(path.read_text())
    tree["fragments"][0]["sharding"]["shape"] = [1 << 60]
    path.write_text(json.dumps(tree))
    with pytest.raises(
        UserError, match=r"manifest.json: the shape of tensor is larger than all files of the checkpoint"
    ):
        Checkpoint(tmp_path / "step")


def test_a_pipe_for_a_file_of_tensors_is_refused(tmp_path, generator):
    full = torch.randn(SHAPES["whole"][0], generator=generator)
    saved = written(tmp_path / "step", shard("whole", 1, 1), 1, full, random.Random(0))
    (tmp_path / "step" / "rank-0.safetensors").unlink()
    os.mkfifo(tmp_path / "step" / "rank-0.safetensors")
    with pytest.raises(UserError, match=r"rank-0.safetensors: is a named pipe"):
        saved.read_weight(NAME)
