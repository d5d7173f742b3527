"""Any range of any rank's share can be read from a checkpoint of any layout."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    FORMAT_VERSION,
    MANIFEST_FILE,
    find_damage,
    fragment_key,
    model_metadata,
)
from tandem.trainer.checkpoint.read import Checkpoint, open_checkpoint
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec
from tandem.trainer.checkpoint.write import commit
from tandem.trainer.config import StableLMConfig, UserError, parse_dataclass
from tandem.trainer.distributed.sharding import TensorSharding, slice_local
from tests.tiny_configs import STABLELM

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
        tables.append({"file": file, "file_info": {"bytes": size, "sha256": "0" * 64}, "entries": entries})
    model = parse_dataclass(StableLMConfig, STABLELM, "model")
    commit(folder, tables, {"step": 1, "tp_size": tp_size, "dp_size": 1, **model_metadata(model, None)})
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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A checkpoint of one tensor on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("sharded") / "step-00000001"
    full = torch.arange(35.0).view(7, 5)
    written(folder, shard("first", 2, 1), 2, full, random.Random(1))
    return folder


def first(tree):
    return tree["fragments"][0]


WRONG_MANIFESTS = {
    "step: -1 is not": lambda tree: tree.update(step=-1),
    "step: '1' is of type str": lambda tree: tree.update(step="1"),
    "states step 2, but the folder is called step-00000001; restore": lambda tree: tree.update(step=2),
    "tp_size: 0 is not": lambda tree: tree.update(tp_size=0),
    "the fragments of tensor do not agree in a sharding over 3 ranks": lambda tree: tree.update(tp_size=3),
    "has checkpoint format 2.0, but": lambda tree: tree.update(format=2.0),
    "has checkpoint format 3, but": lambda tree: tree.update(format=3, new_field=1),
    "model.family: 'other' is not valid": lambda tree: tree["model"].update(family="other"),
    "model.hidden_size: is missing": lambda tree: tree["model"].pop("hidden_size"),
    "fragments: {} is not a list": lambda tree: tree.update(fragments={}),
    "fragments[0].numel: 0 is not": lambda tree: first(tree).update(numel=0),
    "fragments[0].start: 9223372036854775808 does not fit": lambda tree: first(tree).update(start=1 << 63),
    "the fragments of tensor do not cover it exactly once": lambda tree: first(tree).update(numel=first(tree)["numel"] + 1),
    "do not cover it exactly": lambda tree: tree["fragments"].pop(1),
    "not cover it exactly": lambda tree: tree["fragments"].append(first(tree)),
    "cover it exactly": lambda tree: first(tree).update(tp_rank=1),
    "fragments[0].kinds[0]: 'weights' is not valid": lambda tree: first(tree).update(kinds=["weights"]),
    "not the same kinds of state": lambda tree: first(tree).update(kinds=["master", "exp_avg"]),
    "have the kinds of state master, master": lambda tree: [each.update(kinds=["master"] * 2) for each in tree["fragments"]],
    "have a file that is not listed": lambda tree: first(tree).update(file="rank-9.safetensors"),
    "file: '../rank-0.safetensors' is not the name": lambda tree: first(tree).update(file="../rank-0.safetensors"),
    "files: the key '/etc/passwd'": lambda tree: tree["files"].update({"/etc/passwd": tree["files"]["rank-0.safetensors"]}),
    "rank-0.safetensors.sha256: '0' is not a SHA-256": lambda tree: tree["files"]["rank-0.safetensors"].update(sha256="0"),
    "do not agree in a sharding": lambda tree: first(tree)["sharding"].update(dim=1),
    "agree in a sharding": lambda tree: [each["sharding"].update(dim=2) for each in tree["fragments"]],
    "in a sharding over 2": lambda tree: [each["sharding"].update(padded_size=7) for each in tree["fragments"]],
    "shape[0]: -7 is not": lambda tree: first(tree)["sharding"].update(shape=[-7, 5]),
    "guard.losses[0]: 'x' is of type": lambda tree: tree.update(guard={"losses": ["x"]}),
    "cursor.web: -1 is not": lambda tree: tree.update(cursor={"web": -1}),
    "extra: 1 is given, but there is no such field": lambda tree: tree.update(extra=1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_MANIFESTS)
def test_a_committed_manifest_that_states_impossible_things_is_refused_in_one_line(sharded, tmp_path, message):
    folder = shutil.copytree(sharded, tmp_path / sharded.name)
    tree = json.loads((folder / MANIFEST_FILE).read_text())
    WRONG_MANIFESTS[message](tree)
    text = json.dumps(tree)
    (folder / MANIFEST_FILE).write_text(text)
    (folder / COMMIT_MARKER).write_text(hashlib.sha256(text.encode()).hexdigest())
    for opened in (Checkpoint, open_checkpoint, find_damage):
        with pytest.raises(UserError) as caught:
            opened(folder)
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_that_a_user_renamed_is_opened(sharded, tmp_path):
    assert Checkpoint(shutil.copytree(sharded, tmp_path / "best")).step == 1
    with pytest.raises(
        UserError, match="states step 1, but the folder is called step-00000009; restore the folder's name"
    ):
        Checkpoint(shutil.copytree(sharded, tmp_path / "step-00000009"))


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_without_the_tensors_of_the_manifest_is_refused(sharded, tmp_path, content):
    folder = shutil.copytree(sharded, tmp_path / sharded.name)
    (folder / "rank-0.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"rank-0.safetensors is not a safetensors file \(.*; restore the checkpoint"):
        Checkpoint(folder).read_weight(NAME)


def test_a_tensor_of_another_name_shape_or_dtype_than_its_fragment_is_refused(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / sharded.name)
    fragment = first(Checkpoint(folder).manifest)
    key = fragment_key("master", NAME, fragment["start"])
    for name, tensor, message in (
        ("other", torch.zeros(1), f"rank-0.safetensors has no {key}"),
        (
            key,
            torch.zeros(fragment["numel"] + 1),
            rf"{key} in rank-0.safetensors is F32 \[{fragment['numel'] + 1}\], not",
        ),
        (key, torch.zeros(fragment["numel"], dtype=torch.bfloat16), f"{key} in rank-0.safetensors is BF16"),
    ):
        save_file({name: tensor}, folder / "rank-0.safetensors")
        with pytest.raises(UserError, match=message):
            Checkpoint(folder).read_weight(NAME)
    with pytest.raises(UserError, match=r"has no tensor nowhere, which the model in its manifest.json has"):
        Checkpoint(folder).read_weight("nowhere")
