"""Read checkpoints at any tp and dp size: single global tensors by name, or a run's whole state into an engine.

A *box* is one tensor-parallel rank's share of the padded global tensor; a *flat range* is a contiguous range of its elements.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tandem.trainer.checkpoint import layout
from tandem.trainer.config import UserError
from tandem.trainer.config.outside import check_regular_file
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh, all_gather_values, broadcast_from_rank_0, broadcast_from_replica
from tandem.trainer.distributed.sharding import TensorSharding, slice_local
from tandem.trainer.models.init import load_parameter

log = logging.getLogger(__name__)


class Checkpoint(layout.SavedCheckpoint):
    """One committed checkpoint, opened lazily: each call reads only the tensors it needs.

    Raises: UserError if the checkpoint has another format version, or a manifest that states impossible things.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._fragments_by_name: dict[str, list[dict[str, Any]]] = {}
        for fragment in self.manifest["fragments"]:
            self._fragments_by_name.setdefault(fragment["name"], []).append(fragment)
        self._open_file = cache(self._open_tensors)

    def _open_tensors(self, file: str) -> Any:
        check_regular_file(self.folder / file)
        try:
            return safe_open(self.folder / file, framework="pt")
        except SafetensorError as error:
            raise self._damaged(f"{file} is not a safetensors file ({error})") from None

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self.folder}: {fault}; {layout.REMEDY}")

    @property
    def parameter_names(self) -> list[str]:
        return list(self._fragments_by_name)

    def has_state(self, kind: str) -> bool:
        """Whether this kind of state was saved for every tensor."""
        return all(kind in fragment["kinds"] for fragment in self.manifest["fragments"])

    def read_weight(self, name: str) -> Tensor:
        """Return the unpadded global fp32 weights of `name`."""
        return self.read_tensor("master", name)

    def read_tensor(self, kind: str, name: str) -> Tensor:
        """Return the unpadded global fp32 tensor of one kind of state (master, exp_avg, exp_avg_sq).

        Memory: the tensor and, unless the first dim is the sharded one, one rank's box.
        """
        shard = self._saved_sharding(name)
        found = torch.empty(shard.global_shape)
        if shard.sharded_dim is None:
            self._read_flat(found.view(-1), kind, name, 0, 0)
        else:
            rows = math.prod(shard.global_shape[: shard.sharded_dim])
            self._read_sharded_slice(found.view(rows, shard.global_shape[shard.sharded_dim], -1), kind, name, 0, 0)
        return found

    def read_local(
        self, target: Tensor, kind: str, name: str, sharding: TensorSharding, tp_rank: int, tp_size: int, start: int
    ) -> None:
        """Fill the flat `target` with the range of a rank's box that begins at element `start`, with zeros for padding.

        The box is that of `tp_rank` under `sharding` and `tp_size`, which may differ from the saved layout. Reads little
        more from the files than this range.
        """
        saved = self._saved_sharding(name)
        if (saved.global_shape, saved.sharded_dim) != (sharding.global_shape, sharding.sharded_dim):
            raise self._damaged(f"{name} was saved as {saved}, but the model has {sharding}")
        if sharding.sharded_dim is None:
            self._read_flat(target, kind, name, 0, start)
            return
        share = sharding.local_shape(tp_size)[sharding.sharded_dim]
        inner = math.prod(sharding.global_shape[sharding.sharded_dim + 1 :])
        row, end = share * inner, start + target.numel()
        first, last = start // row, (end - 1) // row
        low, high = 0, share
        if first == last:  # within one row, read only the indices that the range covers
            low, high = (start - first * row) // inner, -(-(end - first * row) // inner)
        read = torch.zeros(last - first + 1, high - low, inner)
        self._read_sharded_slice(read, kind, name, first, tp_rank * share + low)
        target.copy_(read.view(-1).narrow(0, start - first * row - low * inner, target.numel()))

    def close(self) -> None:
        """Unmap the files; otherwise they would keep using disk space after they are removed."""
        self._open_file.cache_clear()

    def _saved_sharding(self, name: str) -> TensorSharding:
        """Return the sharding with which the tensor was saved."""
        if name not in self._fragments_by_name:
            raise self._damaged(f"has no tensor {name}, which the model in its {layout.MANIFEST_FILE} has")
        place = self._fragments_by_name[name][0]["sharding"]
        return TensorSharding(tuple(place["shape"]), place["dim"], place["padded_size"])

    def _read_sharded_slice(self, read: Tensor, kind: str, name: str, first_row: int, first_index: int) -> None:
        """Fill `read`, [rows, indices, inner], with the slice that starts at `first_row` and `first_index`.

        Indices count along the sharded dim; the dims before it are flattened to rows. Indices in the padding are not written.
        """
        saved = self._saved_sharding(name)
        assert saved.sharded_dim is not None
        share, inner = saved.padded_size // self.manifest["tp_size"], read.shape[2]
        next_index, end = first_index, min(first_index + read.shape[1], saved.global_shape[saved.sharded_dim])
        while next_index < end:
            tp_rank = next_index // share
            stop = min(end, (tp_rank + 1) * share)
            target = read.narrow(1, next_index - first_index, stop - next_index)
            low = next_index - tp_rank * share
            if len(read) == 1:
                self._read_flat(target.view(-1), kind, name, tp_rank, (first_row * share + low) * inner)
            else:  # the rows of a box are adjacent, so whole rows are one flat range
                full_rows = torch.empty(len(read), share, inner)
                self._read_flat(full_rows.view(-1), kind, name, tp_rank, first_row * share * inner)
                target.copy_(full_rows.narrow(1, low, stop - next_index))
                del full_rows  # free it before the next allocation
            next_index = stop

    def _read_flat(self, target: Tensor, kind: str, name: str, tp_rank: int, start: int) -> None:
        """Fill `target` with the range of a saved box that begins at element `start`."""
        end, read = start + target.numel(), 0
        for fragment in self._fragments_by_name[name]:
            low, high = max(start, fragment["start"]), min(end, fragment["start"] + fragment["numel"])
            if fragment["tp_rank"] != tp_rank or low >= high:
                continue
            saved = self._open_fragment(kind, fragment)
            target[low - start : high - start] = saved[low - fragment["start"] : high - fragment["start"]]
            read += high - low
        assert read == target.numel(), f"{self.folder}: fragments of {name} do not cover it"

    def _open_fragment(self, kind: str, fragment: dict[str, Any]) -> Any:
        """Open the tensor of a fragment. Raises: UserError if its file has none of this shape and dtype."""
        key = layout.fragment_key(kind, fragment["name"], fragment["start"])
        try:
            found = self._open_file(fragment["file"]).get_slice(key)
        except SafetensorError as error:
            raise self._damaged(f"{fragment['file']} has no {key} ({error})") from None
        if (found.get_dtype(), found.get_shape()) != ("F32", [fragment["numel"]]):
            stored = f"{found.get_dtype()} {found.get_shape()}"
            raise self._damaged(f"{key} in {fragment['file']} is {stored}, not F32 [{fragment['numel']}]")
        return found


def open_newest(root: Path, mesh: Mesh | None = None) -> Checkpoint | None:
    """Open the newest undamaged checkpoint in `root`, and warn about damaged ones. Return None if none is committed.

    With a mesh, all ranks must call this; they share the hashing and get the same result.
    Raises: UserError if all committed checkpoints are damaged.
    """
    chosen = _choose_newest(root, mesh)
    return Checkpoint(chosen) if chosen else None


def open_checkpoint(folder: Path, mesh: Mesh | None = None) -> Checkpoint:
    """Open a checkpoint folder, or the newest undamaged checkpoint of a run folder or an import's folder.

    With a mesh, all ranks must call this; they share the hashing.
    Raises: UserError if there is no such checkpoint.
    """
    newest, find_damage = partial(_choose_newest, mesh=mesh), partial(_find_damage, mesh=mesh)
    return Checkpoint(layout.choose_checkpoint(folder, newest, find_damage))


def _choose_newest(root: Path, mesh: Mesh | None) -> Path | None:
    def find_damage(folder: Path) -> str | None:
        damage = _find_damage(folder, mesh)
        if damage and (mesh is None or mesh.rank == 0):
            log.warning("%s is damaged (%s); trying the previous checkpoint", folder, damage)
        return damage

    names = [folder.name for folder in layout.list_committed(root)]
    folders = [root / name for name in (broadcast_from_rank_0(names) if mesh else names)]
    return layout.choose_newest(root, folders, find_damage)


def _find_damage(folder: Path, mesh: Mesh | None) -> str | None:
    if mesh is None:
        return layout.find_damage(folder)
    files = layout.list_data_files(folder)[mesh.rank :: mesh.world_size]
    return next((found for found in all_gather_values(layout.find_damage(folder, files)) if found), None)


@torch.no_grad()
def load_weights(model: nn.Module, read_tensor: Callable[[str], Tensor], mesh: Mesh) -> None:
    """Load this rank's shard of every parameter from `read_tensor(name)`.

    The replicas take turns: for each parameter, only one of them calls `read_tensor`, and broadcasts the weights to the others.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if index % mesh.dp_size == mesh.dp_rank:
            load_parameter(parameter, read_tensor(name), mesh)
        broadcast_from_replica(index % mesh.dp_size, parameter)


@torch.no_grad()
def restore_state(engine: Engine, checkpoint: Checkpoint, mesh: Mesh) -> None:
    """Restore weights, masters, moments and the number of updates. Learning rates and weight decay come from the config."""
    for index, (name, parameter) in enumerate(engine.model.named_parameters()):
        if index % mesh.dp_size == mesh.dp_rank:
            box = torch.empty(parameter.numel())
            checkpoint.read_local(box, "master", name, sharding_of(parameter), mesh.tp_rank, mesh.tp_size, 0)
            parameter.copy_(box.view_as(parameter))
        broadcast_from_replica(index % mesh.dp_size, parameter)
    engine.allocate_moments(checkpoint.manifest.get("num_updates", checkpoint.step))
    parameters = dict(engine.model.named_parameters())
    for fragment in engine.optimizer_fragments():
        sharding = sharding_of(parameters[fragment.name])
        for kind, target in {"master": fragment.master, **fragment.moments}.items():
            checkpoint.read_local(target, kind, fragment.name, sharding, mesh.tp_rank, mesh.tp_size, fragment.start)


@torch.no_grad()
def load_master_weights(engine: Engine, read_tensor: Callable[[str], Tensor], mesh: Mesh) -> None:
    """Load the weights, as `load_weights` does, and the fp32 masters without rounding.

    Memory on the device: one rank's shard of the largest tensor, in fp32.
    """
    fragments = {fragment.name: fragment for fragment in engine.optimizer_fragments()}
    for index, (name, parameter) in enumerate(engine.model.named_parameters()):
        box = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        if index % mesh.dp_size == mesh.dp_rank:
            part = slice_local(sharding_of(parameter), read_tensor(name), mesh.tp_rank, mesh.tp_size)
            box.copy_(part.reshape(box.shape))
        broadcast_from_replica(index % mesh.dp_size, box)
        parameter.copy_(box)
        if name in fragments:
            fragment = fragments[name]
            fragment.master.copy_(box.view(-1).narrow(0, fragment.start, fragment.master.numel()))
