"""A trained model beside it that owns no padding: its parameters, gradients, masters and moments have each rank's true sizes.

Zeros are put beside a parameter for the length of one product and forgotten. So the products, and with them the grouping of
their sums, are those of the padded model, and everything that a run keeps from step to step is not.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from tandem.trainer.distributed.layers import mark, role_of, shard_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import Shard, local_part


class Unpadded(nn.Module):
    """`model` with parameters of true size, equal to its own, under its names with `/` for `.`."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self._padded = (model,)  # in a tuple, so that its parameters are not among ours
        self._boxes: dict[str, tuple[Shard, tuple[int, ...], tuple[int, ...]]] = {}
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            self._boxes[name] = shard, shard.box_shape(mesh.tp_size), tuple(parameter.shape)
            own = nn.Parameter(self.true_part(name, parameter.detach(), mesh).clone())
            self.register_parameter(name.replace(".", "/"), mark(own, shard, role_of(parameter)))

    def true_part(self, name: str, padded: Tensor, mesh: Mesh) -> Tensor:
        """What of the padded model's local tensor is no padding."""
        shard, box, _ = self._boxes[name]
        if shard.dim is None:
            return padded.reshape(box)
        true = local_part(shard, torch.ones(shard.shape), mesh.tp_rank, mesh.tp_size)
        count = int(true.movedim(shard.dim, 0).flatten(1).any(1).sum()) if true.dim() > 1 else int(true.sum())
        return padded.reshape(box).narrow(shard.dim, 0, count)

    def forward(self, *batch: Tensor) -> Tensor:
        full = {}
        for name, (shard, box, shape) in self._boxes.items():
            own = self.get_parameter(name.replace(".", "/"))
            if shard.dim is not None:
                missing = box[shard.dim] - own.shape[shard.dim]
                own = pad(own, [0, 0] * (own.dim() - 1 - shard.dim) + [0, missing])
            full[name] = own.reshape(shape)
        losses: Tensor = functional_call(self._padded[0], full, batch)
        return losses
