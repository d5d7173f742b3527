"""Saving: every rank writes the fragments it owns, rank 0 gathers the table and commits.

Order is the whole point: data files are synced before the manifest names them, the manifest before the marker vouches for
it, and only then are older checkpoints removed. A kill anywhere leaves the last committed folder as it was.
"""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import tensor_file
from trainer.checkpoint.layout import FORMAT, MANIFEST, MARKER, begun, folder_name, key, rank_file
from trainer.config import BTLM, Mup, StableLM
from trainer.disk import sync_folder, write_whole
from trainer.engine import Engine
from trainer.parallel.layers import shard_of
from trainer.parallel.mesh import Mesh, barrier, gather_to_all
from trainer.parallel.shards import Shard
from trainer.tensor_file import Spec

log = logging.getLogger(__name__)
IMPORT_FILE_BYTES = 1_000_000_000
"""Largest file of an import: the ranks of a run share the hashing of them, file by file."""


def save(root: Path, step: int, engine: Engine, mesh: Mesh, *, facts: dict[str, Any], keep: int) -> int:
    """A committed checkpoint of `step` lies in `root`; older ones beyond `keep` are gone. Returns its size in bytes.

    `facts` (model, cursor, fingerprints …) must be the same on every rank; they are stored as they are.
    """
    folder = root / folder_name(step)
    if mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # a torn save of the same step, or one that is being written again
        folder.mkdir(parents=True)
    barrier()
    owned = _owned(engine, mesh)
    entries = [entry for entry, _ in owned]
    specs = {_key(entry, kind): _flat(entry["numel"]) for entry in entries for kind in entry["kinds"]}
    # One at a time from the device: a node's share of the state need not fit its memory a second time.
    tensors = (tensor.cpu() for _, kinds in owned for tensor in kinds)
    file = rank_file(mesh.rank)
    described = _write(folder / file, specs, tensors) if specs else None
    tables: list[dict[str, Any]] = gather_to_all({"file": file, "described": described, "entries": entries})
    if mesh.rank == 0:
        _commit(folder, tables, {"step": step, "tp_size": mesh.tp_size, "dp_size": mesh.dp_size, **facts})
        _retire(folder, keep)
    barrier()
    return sum(table["described"]["bytes"] for table in tables if table["described"])


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
    tables: list[dict[str, Any]] = []
    for index, held in enumerate(tensor_file.runs(entries, _master_bytes, IMPORT_FILE_BYTES)):
        specs = {_key(entry, "master"): _flat(entry["numel"]) for entry in held}
        tensors = (read(entry["name"]).float().reshape(-1) for entry in held)
        file = rank_file(index)
        tables.append({"file": file, "described": _write(folder / file, specs, tensors), "entries": held})
    _commit(folder, tables, {"step": 0, "tp_size": 1, "dp_size": 1, **facts})
    return sum(table["described"]["bytes"] for table in tables)


def model_facts(model: StableLM | BTLM, mup: Mup | None) -> dict[str, Any]:
    """What a reader needs to build the model again."""
    return {"model": dataclasses.asdict(model), "mup": dataclasses.asdict(mup) if mup else None}


def _owned(engine: Engine, mesh: Mesh) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """What this rank saves: entries of the table of fragments, each with its tensors in the order of its kinds."""
    parameters = dict(engine.model.named_parameters())
    if engine.owns_whole_replica() and mesh.dp_rank:
        return []
    owned = []
    for fragment in engine.fragments():
        shard = shard_of(parameters[fragment.name])
        if shard.dim is None and mesh.tp_rank:
            continue  # replicated over tensor-parallel ranks: the first one saves it
        kinds = {"master": fragment.master, **fragment.moments}
        numel = fragment.master.numel()
        entry = _entry(fragment.name, shard, mesh.tp_rank, fragment.start, numel, list(kinds))
        owned.append((entry, list(kinds.values())))
    return owned


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
    size = tensor_file.write(path, specs, tensors, watch=digest.update)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _commit(folder: Path, tables: Iterable[dict[str, Any]], facts: dict[str, Any]) -> None:
    files = {table["file"]: table["described"] for table in tables if table["described"]}
    fragments = [{**entry, "file": table["file"]} for table in tables for entry in table["entries"]]
    text = json.dumps({"format": FORMAT, **facts, "files": files, "fragments": fragments})
    sync_folder(folder)
    write_whole(folder / MANIFEST, text)
    write_whole(folder / MARKER, sha256(text.encode()).hexdigest() + "\n")
    sync_folder(folder.parent)


def _retire(newest: Path, keep: int) -> None:
    """Up to `newest`, just committed, `keep` whole folders are left (0: all of them) and nothing torn.

    Later ones were passed over as damaged when the run continued: they do not count, and a person may look at them.
    """
    found = [folder for folder in begun(newest.parent) if folder <= newest]
    kept = [folder for folder in found if (folder / MARKER).is_file()][-keep:]
    for folder in found:
        if folder not in kept:
            # The marker goes first, so that a kill in the middle leaves no folder that looks whole.
            (folder / MARKER).unlink(missing_ok=True)
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s cannot be removed: %s", folder, error)
