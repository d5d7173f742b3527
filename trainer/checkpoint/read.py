"""Reading: true global tensors by name, whatever layout wrote them, and a run put back to where one was saved."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tandem.trainer.checkpoint.layout import MARKER, committed, damage, data_files, key, read_manifest
from tandem.trainer.config import BTLM, FAMILIES, Mup, StableLM, UserError, section_from
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.layers import shard_of
from tandem.trainer.distributed.mesh import Mesh, from_rank_0, from_replica, gather_to_all
from tandem.trainer.distributed.sharding import Shard, local_part
from tandem.trainer.models.init import place

log = logging.getLogger(__name__)


class Snapshot:
    """One committed checkpoint, opened lazily: tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._by_name: dict[str, list[dict[str, Any]]] = {}
        for fragment in self.manifest["fragments"]:
            self._by_name.setdefault(fragment["name"], []).append(fragment)
        self._files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def has(self, kind: str) -> bool:
        """Whether every tensor was saved with this kind of state."""
        return all(kind in fragment["kinds"] for fragment in self.manifest["fragments"])

    def weight(self, name: str) -> Tensor:
        """The true global fp32 weights of `name`."""
        return self.tensor("master", name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """The true global fp32 tensor of one kind of state (master, exp_avg, exp_avg_sq) of `name`.

        Memory: the tensor and, where the divided dim is not the first, one rank's box.
        """
        shard, _ = self._saved(name)
        found = torch.empty(shard.shape)
        if shard.dim is None:
            self._fill(found.view(-1), kind, name, 0, 0)
        else:
            rows = math.prod(shard.shape[: shard.dim])
            self._fill_places(found.view(rows, shard.shape[shard.dim], -1), kind, name, 0, 0)
        return found

    def fill(self, target: Tensor, kind: str, name: str, cut: Shard, tp_rank: int, tp_size: int, start: int) -> None:
        """`target`, flat, is the run from element `start` on of a rank's box in a layout of `tp_size` that cuts the tensor as
        `cut` says; zeros where that has padding. Of the files little more is read than the run.
        """
        saved, _ = self._saved(name)
        assert (saved.shape, saved.dim) == (cut.shape, cut.dim), f"{name}: {cut} cannot be read from {saved}"
        if cut.dim is None:
            self._fill(target, kind, name, 0, start)
            return
        share, inner = cut.box_shape(tp_size)[cut.dim], math.prod(cut.shape[cut.dim + 1 :])
        row, end = share * inner, start + target.numel()
        first, last = start // row, (end - 1) // row
        low, high = 0, share
        if first == last:  # of one row only the places that the run meets are read
            low, high = (start - first * row) // inner, -(-(end - first * row) // inner)
        read = torch.zeros(last - first + 1, high - low, inner)
        self._fill_places(read, kind, name, first, tp_rank * share + low)
        target.copy_(read.view(-1).narrow(0, start - first * row - low * inner, target.numel()))

    def sections(self) -> tuple[StableLM | BTLM, Mup | None]:
        """The model and its parametrisation as they were saved."""
        tree = self.manifest["model"]
        model = section_from(FAMILIES[tree["family"]], tree, "model")
        mup = self.manifest["mup"]
        return model, section_from(Mup, mup, "mup") if mup else None

    def close(self) -> None:
        """The files are let go; they would else stay mapped, and their space in use after they are removed."""
        self._files.clear()

    def _saved(self, name: str) -> tuple[Shard, int]:
        """How the tensor was cut when it was saved, and over how many ranks."""
        place = self._by_name[name][0]["shard"]
        shard = Shard(tuple(place["shape"]), place["dim"], place["padded_size"])
        return shard, self.manifest["tp_size"] if shard.dim is not None else 1

    def _fill_places(self, read: Tensor, kind: str, name: str, row: int, place: int) -> None:
        """`read`, [rows, places, inner], holds what was saved from that row and that place of the divided dim on, true places
        only: its last ones may be padding, and are left alone.
        """
        saved, tp_size = self._saved(name)
        assert saved.dim is not None
        share, inner = saved.padded_size // tp_size, read.shape[2]
        begin, end = place, min(place + read.shape[1], saved.shape[saved.dim])
        while begin < end:
            box = begin // share
            stop = min(end, (box + 1) * share)
            target = read.narrow(1, begin - place, stop - begin)
            low = begin - box * share
            if len(read) == 1:
                self._fill(target.view(-1), kind, name, box, (row * share + low) * inner)
            else:  # the rows of a box lie one after the other: all places of the first to the last are a run
                whole = torch.empty(len(read), share, inner)
                self._fill(whole.view(-1), kind, name, box, row * share * inner)
                target.copy_(whole.narrow(1, low, stop - begin))
                del whole  # before the next is made
            begin = stop

    def _fill(self, flat: Tensor, kind: str, name: str, tp_rank: int, start: int) -> None:
        """`flat` is the run from element `start` on of a saved box."""
        end, read = start + flat.numel(), 0
        for fragment in self._by_name[name]:
            low, high = max(start, fragment["start"]), min(end, fragment["start"] + fragment["numel"])
            if fragment["tp_rank"] != tp_rank or low >= high:
                continue
            saved = self._file(fragment["file"]).get_slice(key(kind, name, fragment["start"]))
            flat[low - start : high - start] = saved[low - fragment["start"] : high - fragment["start"]]
            read += high - low
        assert read == flat.numel(), f"{self.folder}: fragments of {name} do not cover it"

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]


def newest(root: Path, mesh: Mesh | None = None) -> Snapshot | None:
    """The newest committed checkpoint below `root` that is whole; damaged ones are named in a warning and passed over.

    With a mesh all ranks call this together, share the hashing and come to one answer.

    Raises: UserError when there are committed checkpoints and none is whole.
    """
    folders = from_rank_0(committed(root)) if mesh else committed(root)
    for folder in reversed(folders):
        wrong = _damage_on_all_ranks(folder, mesh) if mesh else damage(folder)
        if wrong is None:
            return Snapshot(folder)
        if mesh is None or mesh.rank == 0:
            log.warning("%s is damaged (%s); trying the one before", folder, wrong)
    if folders:
        raise UserError(
            f"{root}: none of its {len(folders)} checkpoints is whole; a run continues from a whole one or starts anew; "
            "move the folder away or choose another run.name"
        )
    return None


def _damage_on_all_ranks(folder: Path, mesh: Mesh) -> str | None:
    files = data_files(folder)[mesh.rank :: mesh.world_size]
    return next((found for found in gather_to_all(damage(folder, files)) if found), None)


def opened(folder: Path, mesh: Mesh | None = None) -> Snapshot:
    """The newest whole checkpoint of a run folder, an import's folder, or a checkpoint folder itself.

    With a mesh all ranks call this together and share the hashing.

    Raises: UserError when there is none.
    """
    roots = [folder / "checkpoints", folder]
    snapshot = next((found for root in roots if (found := newest(root, mesh))), None)
    if snapshot is None and (folder / MARKER).is_file():
        wrong = _damage_on_all_ranks(folder, mesh) if mesh else damage(folder)
        if wrong:
            raise UserError(f"{folder}: is damaged ({wrong}); name another checkpoint or the run's folder")
        snapshot = Snapshot(folder)
    if snapshot is None:
        raise UserError(
            f"{folder}: no committed checkpoint there; give a run folder that has saved one, or an import's folder"
        )
    return snapshot


@torch.no_grad()
def load_weights(model: nn.Module, read: Callable[[str], Tensor], mesh: Mesh) -> None:
    """Every parameter holds its rank's part of the tensor of its name.

    Of each tensor one replica reads or draws, in turn, and hands it to the others: a cluster reads a model once.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if index % mesh.dp_size == mesh.dp_rank:
            place(parameter, read(name), mesh)
        from_replica(index % mesh.dp_size, parameter)


@torch.no_grad()
def restore(engine: Engine, snapshot: Snapshot, mesh: Mesh) -> None:
    """Weights, masters, moments and the number of updates are the saved ones; learning rates and decay stay the config's."""
    for index, (name, parameter) in enumerate(engine.model.named_parameters()):
        if index % mesh.dp_size == mesh.dp_rank:
            box = torch.empty(parameter.numel())
            snapshot.fill(box, "master", name, shard_of(parameter), mesh.tp_rank, mesh.tp_size, 0)
            parameter.copy_(box.view_as(parameter))
        from_replica(index % mesh.dp_size, parameter)
    engine.allocate_moments(snapshot.manifest.get("updates", snapshot.step))
    parameters = dict(engine.model.named_parameters())
    for fragment in engine.fragments():
        cut = shard_of(parameters[fragment.name])
        for kind, target in {"master": fragment.master, **fragment.moments}.items():
            snapshot.fill(target, kind, fragment.name, cut, mesh.tp_rank, mesh.tp_size, fragment.start)


@torch.no_grad()
def set_weights(engine: Engine, read: Callable[[str], Tensor], mesh: Mesh) -> None:
    """`load_weights` for a model in training: this rank's fp32 masters hold the tensors unrounded.

    Each tensor is read or drawn once, by one replica. Memory on the device: one rank's part of the largest, in fp32.
    """
    fragments = {fragment.name: fragment for fragment in engine.fragments()}
    for index, (name, parameter) in enumerate(engine.model.named_parameters()):
        box = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        if index % mesh.dp_size == mesh.dp_rank:
            part = local_part(shard_of(parameter), read(name), mesh.tp_rank, mesh.tp_size)
            box.copy_(part.reshape(box.shape))
        from_replica(index % mesh.dp_size, box)
        parameter.copy_(box)
        if name in fragments:
            fragment = fragments[name]
            fragment.master.copy_(box.view(-1).narrow(0, fragment.start, fragment.master.numel()))
