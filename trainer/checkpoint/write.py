"""Write checkpoints to disk: every rank writes the fragments it owns, and rank 0 commits a manifest of all files.

The order of writes makes a save safe: data files first, then the manifest, then the commit marker, each synced to disk. Older
checkpoints are removed last. A kill at any point leaves the last committed checkpoint intact.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.trainer.checkpoint import layout, safetensors_writer
from tandem.trainer.checkpoint.safetensors_writer import TensorSpec
from tandem.trainer.disk import atomic_write, sync_folder
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding

log = logging.getLogger(__name__)
WrittenFile = dict[str, Any]
"""A rank's data file: its name, its size and hash (None if the rank owns nothing), and its manifest entries."""
MAX_IMPORT_FILE_BYTES = 1_000_000_000
"""Size limit for the files of an import. Ranks share the hashing by file, so a large import must have several files."""


def prepare_folder(folder: Path) -> None:
    """Create an empty folder for a save, and remove the uncommitted folders that earlier saves left beside it.

    A save leaves such a folder if it is killed, or if it fails and cannot remove the folder. Such folders waste disk space.
    Raises: OSError, except if an earlier save's folder cannot be removed.
    """
    markers = (layout.COMMIT_MARKER, layout.REJECTED_MARKER)
    for torn in layout.list_checkpoints(folder.parent):
        if torn != folder and not any((torn / marker).exists() for marker in markers):
            with suppress(OSError):
                remove_checkpoint(torn)
    if folder.exists():
        remove_checkpoint(folder)
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync_folder(folder.parent.parent)
    folder.mkdir()


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint folder.

    Raises: OSError. The folder is then no longer committed, unless the removal of the marker failed.
    """
    if folder.is_symlink():
        folder.unlink()  # never remove the files of the folder that it names
        return
    # Remove the marker first, so that an interrupted removal leaves no committed folder.
    (folder / layout.COMMIT_MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_rank_file(folder: Path, rank: int, entries: list[dict[str, Any]], tensors: Iterable[Tensor]) -> WrittenFile:
    """Write and sync the rank's file, if it owns any fragments. `tensors` are in the order of the entries' `kinds`."""
    file, info, digest = f"rank-{rank:05d}.safetensors", None, sha256()
    specs = {
        layout.fragment_key(kind, entry["name"], entry["start"]): TensorSpec(torch.float32, (entry["numel"],))
        for entry in entries for kind in entry["kinds"]
    }  # fmt: skip
    if specs:
        size = safetensors_writer.write_safetensors(folder / file, specs, tensors, on_chunk=digest.update)
        info = {"bytes": size, "sha256": digest.hexdigest()}
    return {"file": file, "file_info": info, "entries": entries}


def save_imported_weights(
    root: Path, read_tensor: Callable[[str], Tensor], shapes: dict[str, tuple[int, ...]], *, metadata: dict[str, Any]
) -> int:
    """Write an import: a committed checkpoint of step 0 with weights only. Return its size in bytes.

    Reads one tensor at a time.
    """
    folder = root / layout.step_folder_name(0)
    folder.mkdir(parents=True)
    entries = [
        _fragment_entry(name, TensorSharding(shape), 0, 0, math.prod(shape), ["master"])
        for name, shape in shapes.items()
    ]
    groups = safetensors_writer.group_by_bytes(
        entries, lambda entry: entry["numel"] * torch.float32.itemsize, MAX_IMPORT_FILE_BYTES
    )
    written_files = [
        write_rank_file(folder, index, group, (read_tensor(entry["name"]).float().reshape(-1) for entry in group))
        for index, group in enumerate(groups)
    ]
    commit(folder, written_files, {"step": 0, "tp_size": 1, "dp_size": 1, **metadata})
    return total_bytes(written_files)


def total_bytes(written_files: Iterable[WrittenFile]) -> int:
    return sum(table["file_info"]["bytes"] for table in written_files if table["file_info"])


def rank_fragments(engine: Engine, mesh: Mesh) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return the manifest entries of the fragments that this rank saves, and their tensors.

    The tensors are in the order of the entries' `kinds`. They are views of the live state on the device.
    """
    entries: list[dict[str, Any]] = []
    tensors: list[Tensor] = []
    if engine.has_full_optimizer_state and mesh.dp_rank:
        return entries, tensors
    parameters = dict(engine.model.named_parameters())
    for fragment in engine.optimizer_fragments():
        shard = sharding_of(parameters[fragment.name])
        if shard.sharded_dim is None and mesh.tp_rank:
            continue  # replicated over tensor-parallel ranks; the first one saves it
        kinds = {"master": fragment.master, **fragment.moments}
        numel = fragment.master.numel()
        entries.append(_fragment_entry(fragment.name, shard, mesh.tp_rank, fragment.start, numel, list(kinds)))
        tensors += kinds.values()
    return entries, tensors


def _fragment_entry(
    name: str, shard: TensorSharding, tp_rank: int, start: int, numel: int, kinds: list[str]
) -> dict[str, Any]:
    sharding = {"shape": list(shard.global_shape), "dim": shard.sharded_dim, "padded_size": shard.padded_size}
    return {"name": name, "sharding": sharding, "tp_rank": tp_rank, "start": start, "numel": numel, "kinds": kinds}


def commit(folder: Path, written_files: Iterable[WrittenFile], metadata: dict[str, Any]) -> None:
    """Commit the folder: write the manifest of all ranks' files, then the commit marker."""
    files = {table["file"]: table["file_info"] for table in written_files if table["file_info"]}
    fragments = [{**entry, "file": table["file"]} for table in written_files for entry in table["entries"]]
    text = json.dumps({"format": layout.FORMAT_VERSION, **metadata, "files": files, "fragments": fragments})
    sync_folder(folder)
    atomic_write(folder / layout.MANIFEST_FILE, text)
    atomic_write(folder / layout.COMMIT_MARKER, sha256(text.encode()).hexdigest() + "\n")
    sync_folder(folder.parent)


def reject_later(chosen: Path) -> None:
    """Mark all checkpoints newer than `chosen` as rejected; they are damaged.

    They no longer count towards `keep_last`, so pruning does not keep them in place of good checkpoints. They stay on disk for
    inspection until the run passes their step.
    """
    for folder in layout.list_checkpoints(chosen.parent):
        if folder > chosen and (folder / layout.COMMIT_MARKER).is_file():
            try:
                (folder / layout.COMMIT_MARKER).rename(folder / layout.REJECTED_MARKER)
                sync_folder(folder)
            except OSError as error:
                log.warning("%s cannot be marked as damaged: %s", folder, error)


def prune(newest: Path, keep_last: int) -> None:
    """Remove all checkpoint folders up to `newest`, except the last `keep_last` committed ones (0 keeps all committed ones)."""
    folders = [folder for folder in layout.list_checkpoints(newest.parent) if folder <= newest]
    kept = [folder for folder in folders if (folder / layout.COMMIT_MARKER).is_file()][-keep_last:]
    for folder in folders:
        if folder not in kept:
            try:
                remove_checkpoint(folder)
            except OSError as error:
                log.warning("%s cannot be removed: %s", folder, error)
