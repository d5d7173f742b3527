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
from tandem.trainer.checkpoint.layout import FORMAT, MANIFEST, MARKER, PASSED_OVER, begun, folder_name, key, rank_file
from tandem.trainer.checkpoint.safetensors_writer import Spec
from tandem.trainer.config import BTLM, Mup, StableLM
from tandem.trainer.disk import sync_folder, write_whole
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import shard_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import Shard

log = logging.getLogger(__name__)
Share = list[tuple[dict[str, Any], list[Tensor]]]
"""Entries of the table of fragments, each with its tensors in the order of its kinds."""
Table = dict[str, Any]
"""What a rank has written: its file, size and hash, and the entries in it."""
IMPORT_FILE_BYTES = 1_000_000_000
"""Largest file of an import: the ranks of a run share the hashing of them, file by file."""


def begin(folder: Path) -> None:
    """Make the folder, empty, and remove what earlier saves beside it left without committing it.

    A kill leaves such folders, and so does a save that fails while the disk takes no removals. They would take the room of
    every save to come. Raises: OSError, but not if only what an earlier save left cannot be removed.
    """
    for torn in begun(folder.parent):
        if torn != folder and not (torn / MARKER).exists() and not (torn / PASSED_OVER).exists():
            with suppress(OSError):
                remove(torn)
    if folder.exists():
        remove(folder)
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        sync_folder(folder.parent.parent)
    folder.mkdir()


def remove(folder: Path) -> None:
    """The folder is gone. Raises: OSError; what is left does not count as a checkpoint, unless nothing could be removed."""
    # The marker goes first, so that a kill in the middle leaves no folder that looks whole.
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_share(folder: Path, rank: int, share: Share) -> Table:
    """The rank's file holds its share of the state and is on disk."""
    specs = {_key(entry, kind): _flat(entry["numel"]) for entry, _ in share for kind in entry["kinds"]}
    tensors = (tensor for _, kinds in share for tensor in kinds)
    file = rank_file(rank)
    described = _write(folder / file, specs, tensors) if specs else None
    return {"file": file, "described": described, "entries": [entry for entry, _ in share]}


def save_weights(
    root: Path,
    read: Callable[[str], Tensor],
    shapes: dict[str, tuple[int, ...]],
    *,
    facts: dict[str, Any],
) -> int:
    """A committed checkpoint of step 0 with weights only, read one tensor at a time: what an import leaves behind. Returns its
    size in bytes.
    """
    folder = root / folder_name(0)
    folder.mkdir(parents=True)
    entries = [_entry(name, Shard(shape), 0, 0, math.prod(shape), ["master"]) for name, shape in shapes.items()]
    tables: list[Table] = []
    for index, held in enumerate(safetensors_writer.runs(entries, _master_bytes, IMPORT_FILE_BYTES)):
        specs = {_key(entry, "master"): _flat(entry["numel"]) for entry in held}
        tensors = (read(entry["name"]).float().reshape(-1) for entry in held)
        file = rank_file(index)
        tables.append({"file": file, "described": _write(folder / file, specs, tensors), "entries": held})
    commit(folder, tables, {"step": 0, "tp_size": 1, "dp_size": 1, **facts})
    return num_bytes(tables)


def num_bytes(tables: Iterable[Table]) -> int:
    """Size of all files of a checkpoint."""
    return sum(table["described"]["bytes"] for table in tables if table["described"])


def model_facts(model: StableLM | BTLM, mup: Mup | None) -> dict[str, Any]:
    """What a reader needs to build the model again."""
    return {"model": dataclasses.asdict(model), "mup": dataclasses.asdict(mup) if mup else None}


def share_of(engine: Engine, mesh: Mesh) -> Share:
    """What this rank saves, as it is at this moment on the device."""
    parameters = dict(engine.model.named_parameters())
    if engine.owns_whole_replica() and mesh.dp_rank:
        return []
    share = []
    for fragment in engine.fragments():
        shard = shard_of(parameters[fragment.name])
        if shard.dim is None and mesh.tp_rank:
            continue  # replicated over tensor-parallel ranks: the first one saves it
        kinds = {"master": fragment.master, **fragment.moments}
        numel = fragment.master.numel()
        entry = _entry(fragment.name, shard, mesh.tp_rank, fragment.start, numel, list(kinds))
        share.append((entry, list(kinds.values())))
    return share


def _entry(name: str, shard: Shard, tp_rank: int, start: int, numel: int, kinds: list[str]) -> dict[str, Any]:
    place = {"shape": list(shard.shape), "dim": shard.dim, "padded_size": shard.padded_size}
    return {"name": name, "shard": place, "tp_rank": tp_rank, "start": start, "numel": numel, "kinds": kinds}


def _key(entry: dict[str, Any], kind: str) -> str:
    return key(kind, entry["name"], entry["start"])


def _master_bytes(entry: dict[str, Any]) -> int:
    return _flat(entry["numel"]).num_bytes


def _flat(numel: int) -> Spec:
    return Spec(torch.float32, (numel,))


def _write(path: Path, specs: Mapping[str, Spec], tensors: Iterable[Tensor]) -> dict[str, Any]:
    digest = sha256()
    size = safetensors_writer.write(path, specs, tensors, watch=digest.update)
    return {"bytes": size, "sha256": digest.hexdigest()}


def commit(folder: Path, tables: Iterable[Table], facts: dict[str, Any]) -> None:
    """The folder counts: what all ranks have written into it is one checkpoint."""
    files = {table["file"]: table["described"] for table in tables if table["described"]}
    fragments = [{**entry, "file": table["file"]} for table in tables for entry in table["entries"]]
    text = json.dumps({"format": FORMAT, **facts, "files": files, "fragments": fragments})
    sync_folder(folder)
    write_whole(folder / MANIFEST, text)
    write_whole(folder / MARKER, sha256(text.encode()).hexdigest() + "\n")
    sync_folder(folder.parent)


def pass_over_later(chosen: Path) -> None:
    """Checkpoints later than the one that a run goes on from are damaged: they do not count any longer, whole ones are not
    removed for their sake, and a person may look at them until the run gets there.
    """
    for folder in begun(chosen.parent):
        if folder > chosen and (folder / MARKER).is_file():
            try:
                (folder / MARKER).rename(folder / PASSED_OVER)
                sync_folder(folder)
            except OSError as error:
                log.warning("%s cannot be marked as damaged: %s", folder, error)


def retire(newest: Path, keep: int) -> None:
    """Up to `newest`, just committed or gone on from, `keep` committed folders are left (0: all of them) and nothing else."""
    found = [folder for folder in begun(newest.parent) if folder <= newest]
    kept = [folder for folder in found if (folder / MARKER).is_file()][-keep:]
    for folder in found:
        if folder not in kept:
            try:
                remove(folder)
            except OSError as error:
                log.warning("%s cannot be removed: %s", folder, error)
