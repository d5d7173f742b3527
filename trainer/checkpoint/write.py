"""What is on disk of a save: every rank writes the fragments it owns, one commits the table of all.

Order is the whole point: data files are synced before the manifest names them, the manifest before the marker vouches for
it, and only then are older checkpoints removed. A kill anywhere leaves the last committed folder as it was.
"""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.trainer.checkpoint import safetensors_writer
from tandem.trainer.checkpoint.layout import (
    COMMIT_MARKER,
    FORMAT_VERSION,
    MANIFEST_FILE,
    REJECTED_MARKER,
    fragment_key,
    list_checkpoints,
    rank_file_name,
    step_folder_name,
)
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec
from tandem.trainer.config import BTLMConfig, MupConfig, StableLMConfig
from tandem.trainer.disk import atomic_write, sync_folder
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding

log = logging.getLogger(__name__)
RankFragments = list[tuple[dict[str, Any], list[Tensor]]]
"""Entries of the table of fragments, each with its tensors in the order of its kinds."""
WrittenFile = dict[str, Any]
"""What a rank has written: its file, size and hash, and the entries in it."""
MAX_IMPORT_FILE_BYTES = 1_000_000_000
"""Largest file of an import: the ranks of a run share the hashing of them, file by file."""


def prepare_folder(folder: Path) -> None:
    """Make the folder, empty, and remove what earlier saves beside it left without committing it.

    A kill leaves such folders, and so does a save that fails while the disk takes no removals. They would take the room of
    every save to come. Raises: OSError, but not if only what an earlier save left cannot be removed.
    """
    for torn in list_checkpoints(folder.parent):
        if torn != folder and not (torn / COMMIT_MARKER).exists() and not (torn / REJECTED_MARKER).exists():
            with suppress(OSError):
                remove_checkpoint(torn)
    if folder.exists():
        remove_checkpoint(folder)
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync_folder(folder.parent.parent)
    folder.mkdir()


def remove_checkpoint(folder: Path) -> None:
    """The folder is gone. Raises: OSError; what is left does not count as a checkpoint, unless nothing could be removed."""
    # The marker goes first, so that a kill in the middle leaves no folder that looks whole.
    (folder / COMMIT_MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_rank_file(folder: Path, rank: int, fragments: RankFragments) -> WrittenFile:
    """The rank's file holds its share of the state and is on disk."""
    specs = {_entry_key(entry, kind): _flat_spec(entry["numel"]) for entry, _ in fragments for kind in entry["kinds"]}
    tensors = (tensor for _, kinds in fragments for tensor in kinds)
    file = rank_file_name(rank)
    file_info = _write_file(folder / file, specs, tensors) if specs else None
    return {"file": file, "file_info": file_info, "entries": [entry for entry, _ in fragments]}


def save_imported_weights(
    root: Path,
    read_tensor: Callable[[str], Tensor],
    shapes: dict[str, tuple[int, ...]],
    *,
    metadata: dict[str, Any],
) -> int:
    """A committed checkpoint of step 0 with weights only, read one tensor at a time: what an import leaves behind. Returns its
    size in bytes.
    """
    folder = root / step_folder_name(0)
    folder.mkdir(parents=True)
    entries = [
        _fragment_entry(name, TensorSharding(shape), 0, 0, math.prod(shape), ["master"])
        for name, shape in shapes.items()
    ]
    written_files: list[WrittenFile] = []
    for index, file_entries in enumerate(
        safetensors_writer.group_by_bytes(entries, _master_bytes, MAX_IMPORT_FILE_BYTES)
    ):
        specs = {_entry_key(entry, "master"): _flat_spec(entry["numel"]) for entry in file_entries}
        tensors = (read_tensor(entry["name"]).float().reshape(-1) for entry in file_entries)
        file = rank_file_name(index)
        written_files.append(
            {"file": file, "file_info": _write_file(folder / file, specs, tensors), "entries": file_entries}
        )
    commit(folder, written_files, {"step": 0, "tp_size": 1, "dp_size": 1, **metadata})
    return total_bytes(written_files)


def total_bytes(written_files: Iterable[WrittenFile]) -> int:
    """Size of all files of a checkpoint."""
    return sum(table["file_info"]["bytes"] for table in written_files if table["file_info"])


def model_metadata(model: StableLMConfig | BTLMConfig, mup: MupConfig | None) -> dict[str, Any]:
    """What a reader needs to build the model again."""
    return {"model": dataclasses.asdict(model), "mup": dataclasses.asdict(mup) if mup else None}


def rank_fragments(engine: Engine, mesh: Mesh) -> RankFragments:
    """What this rank saves, as it is at this moment on the device."""
    parameters = dict(engine.model.named_parameters())
    if engine.has_full_optimizer_state() and mesh.dp_rank:
        return []
    fragments = []
    for fragment in engine.optimizer_fragments():
        shard = sharding_of(parameters[fragment.name])
        if shard.sharded_dim is None and mesh.tp_rank:
            continue  # replicated over tensor-parallel ranks: the first one saves it
        kinds = {"master": fragment.master, **fragment.moments}
        numel = fragment.master.numel()
        entry = _fragment_entry(fragment.name, shard, mesh.tp_rank, fragment.start, numel, list(kinds))
        fragments.append((entry, list(kinds.values())))
    return fragments


def _fragment_entry(
    name: str, shard: TensorSharding, tp_rank: int, start: int, numel: int, kinds: list[str]
) -> dict[str, Any]:
    sharding = {"shape": list(shard.global_shape), "dim": shard.sharded_dim, "padded_size": shard.padded_size}
    return {"name": name, "sharding": sharding, "tp_rank": tp_rank, "start": start, "numel": numel, "kinds": kinds}


def _entry_key(entry: dict[str, Any], kind: str) -> str:
    return fragment_key(kind, entry["name"], entry["start"])


def _master_bytes(entry: dict[str, Any]) -> int:
    return _flat_spec(entry["numel"]).num_bytes


def _flat_spec(numel: int) -> TensorSpec:
    return TensorSpec(torch.float32, (numel,))


def _write_file(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[Tensor]) -> dict[str, Any]:
    digest = sha256()
    size = safetensors_writer.write_safetensors(path, specs, tensors, on_chunk=digest.update)
    return {"bytes": size, "sha256": digest.hexdigest()}


def commit(folder: Path, written_files: Iterable[WrittenFile], metadata: dict[str, Any]) -> None:
    """The folder counts: what all ranks have written into it is one checkpoint."""
    files = {table["file"]: table["file_info"] for table in written_files if table["file_info"]}
    fragments = [{**entry, "file": table["file"]} for table in written_files for entry in table["entries"]]
    text = json.dumps({"format": FORMAT_VERSION, **metadata, "files": files, "fragments": fragments})
    sync_folder(folder)
    atomic_write(folder / MANIFEST_FILE, text)
    atomic_write(folder / COMMIT_MARKER, sha256(text.encode()).hexdigest() + "\n")
    sync_folder(folder.parent)


def reject_later(chosen: Path) -> None:
    """Checkpoints later than the one that a run goes on from are damaged: they do not count any longer, whole ones are not
    removed for their sake, and a person may look at them until the run gets there.
    """
    for folder in list_checkpoints(chosen.parent):
        if folder > chosen and (folder / COMMIT_MARKER).is_file():
            try:
                (folder / COMMIT_MARKER).rename(folder / REJECTED_MARKER)
                sync_folder(folder)
            except OSError as error:
                log.warning("%s cannot be marked as damaged: %s", folder, error)


def prune(newest: Path, keep_last: int) -> None:
    """Up to `newest`, just committed or gone on from, `keep_last` committed folders are left (0: all of them) and nothing
    else.
    """
    folders = [folder for folder in list_checkpoints(newest.parent) if folder <= newest]
    kept = [folder for folder in folders if (folder / COMMIT_MARKER).is_file()][-keep_last:]
    for folder in folders:
        if folder not in kept:
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("%s cannot be removed: %s", folder, error)
