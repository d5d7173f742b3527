"""Reading: true global tensors by name, whatever layout wrote them, and a run put back to where one was saved."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.checkpoint.layout import KINDS, MARKER, committed, damage, data_files, key, read_manifest
from trainer.config import BTLM, FAMILIES, Mup, StableLM, UserError, section_from
from trainer.engine import Engine
from trainer.models.init import place
from trainer.parallel.layers import shard_of
from trainer.parallel.mesh import Mesh, from_rank_0, gather_to_all
from trainer.parallel.shards import Shard, local_part

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

        Memory: the tensor and, where a rank's box is no run of it, one box.
        """
        fragments = self._by_name[name]
        place = fragments[0]["shard"]
        shard = Shard(tuple(place["shape"]), place["dim"], place["padded_size"])
        tp_size = self.manifest["tp_size"] if shard.dim is not None else 1
        padded = torch.empty(shard.box_shape(1))
        for tp_rank, hole in enumerate(padded.chunk(tp_size, dim=shard.dim or 0)):
            box = hole if hole.is_contiguous() else torch.empty(hole.shape)
            self._fill_box(box.view(-1), kind, name, [each for each in fragments if each["tp_rank"] == tp_rank])
            if box is not hole:
                hole.copy_(box)
            del box  # before the next is made
        return padded if shard.dim is None else padded.narrow(shard.dim, 0, shard.shape[shard.dim])

    def sections(self) -> tuple[StableLM | BTLM, Mup | None]:
        """The model and its parametrisation as they were saved."""
        tree = self.manifest["model"]
        model = section_from(FAMILIES[tree["family"]], tree, "model")
        mup = self.manifest["mup"]
        return model, section_from(Mup, mup, "mup") if mup else None

    def close(self) -> None:
        """The files are let go; they would else stay mapped, and their space in use after they are removed."""
        self._files.clear()

    def _fill_box(self, flat: Tensor, kind: str, name: str, fragments: list[dict[str, Any]]) -> None:
        for fragment in fragments:
            start, numel = fragment["start"], fragment["numel"]
            flat[start : start + numel] = self._file(fragment["file"]).get_tensor(key(kind, name, start))
        read = sum(fragment["numel"] for fragment in fragments)
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


def load_weights(model: nn.Module, read: Callable[[str], Tensor], mesh: Mesh) -> None:
    """Every parameter holds its rank's part of the tensor of its name."""
    for name, parameter in model.named_parameters():
        place(parameter, read(name), mesh)


def restore(engine: Engine, snapshot: Snapshot, mesh: Mesh) -> None:
    """Masters and moments of this rank's fragments are the saved ones; learning rates and decay stay the config's."""
    engine.allocate_moments(snapshot.step)
    for kind in KINDS:
        _fill(engine, kind, partial(snapshot.tensor, kind), mesh)


def set_masters(engine: Engine, read: Callable[[str], Tensor], mesh: Mesh) -> None:
    """The fp32 weights of this rank's fragments are `read`'s, unrounded; DeepSpeed makes them from the model's bf16 ones."""
    _fill(engine, "master", read, mesh)


@torch.no_grad()
def _fill(engine: Engine, kind: str, read: Callable[[str], Tensor], mesh: Mesh) -> None:
    parameters = dict(engine.model.named_parameters())
    for fragment in engine.fragments():
        target = {"master": fragment.master, **fragment.moments}[kind]
        part = local_part(shard_of(parameters[fragment.name]), read(fragment.name), mesh.tp_rank, mesh.tp_size)
        target.copy_(part.reshape(-1)[fragment.start : fragment.start + target.numel()])
