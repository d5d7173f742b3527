"""A trained model beside it that owns no padding: its parameters, gradients, masters and moments have each rank's true sizes.

Zeros are put beside a parameter for the length of one product and forgotten. So the products, and with them the grouping of
their sums, are those of the padded model, and everything that a run keeps from step to step is not.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from tandem.trainer.distributed.layers import annotate_parameter, role_of, sharding_of
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding, slice_local


class UnpaddedModel(nn.Module):
    """`model` with parameters of true size, equal to its own, under its names with `/` for `.`."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self._padded = (model,)  # in a tuple, so that its parameters are not among ours
        self._shards: dict[str, tuple[TensorSharding, tuple[int, ...], tuple[int, ...]]] = {}
        for name, parameter in model.named_parameters():
            shard = sharding_of(parameter)
            self._shards[name] = shard, shard.local_shape(mesh.tp_size), tuple(parameter.shape)
            own = nn.Parameter(self.unpadded_part(name, parameter.detach(), mesh).clone())
            self.register_parameter(name.replace(".", "/"), annotate_parameter(own, shard, role_of(parameter)))

    def unpadded_part(self, name: str, padded: Tensor, mesh: Mesh) -> Tensor:
        """What of the padded model's local tensor is no padding."""
        shard, box, _ = self._shards[name]
        if shard.sharded_dim is None:
            return padded.reshape(box)
        true = slice_local(shard, torch.ones(shard.global_shape), mesh.tp_rank, mesh.tp_size)
        count = int(true.movedim(shard.sharded_dim, 0).flatten(1).any(1).sum()) if true.dim() > 1 else int(true.sum())
        return padded.reshape(box).narrow(shard.sharded_dim, 0, count)

    def forward(self, *batch: Tensor) -> Tensor:
        full = {}
        for name, (shard, box, shape) in self._shards.items():
            own = self.get_parameter(name.replace(".", "/"))
            if shard.sharded_dim is not None:
                missing = box[shard.sharded_dim] - own.shape[shard.sharded_dim]
                own = pad(own, [0, 0] * (own.dim() - 1 - shard.sharded_dim) + [0, missing])
            full[name] = own.reshape(shape)
        losses: Tensor = functional_call(self._padded[0], full, batch)
        return losses
