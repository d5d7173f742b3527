"""Parameters in shares: given their initial values, and put together again."""

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding
from tandem.trainer.models.init import initial_values, load_parameter
from tandem.trainer.models.mup import ParameterRule


def fill(model: nn.Module, table: dict[str, ParameterRule], *, seed: int, truncation_sigmas: float, mesh: Mesh) -> None:
    """Every parameter holds its rank's part of its initial value, as those of a new run do; padding is zero."""
    value = initial_values(model, table, seed=seed, truncation_sigmas=truncation_sigmas)
    for name, parameter in model.named_parameters():
        load_parameter(parameter, value(name), mesh)


def joined(shard: TensorSharding, parts: list[Tensor]) -> Tensor:
    """The true global tensor from every rank's local one, in rank order; padding is dropped. Of one part it is a view."""
    if shard.sharded_dim is None:
        return parts[0].reshape(shard.global_shape)
    box = shard.local_shape(len(parts))
    boxes = [part.reshape(box) for part in parts]
    whole = torch.cat(boxes, dim=shard.sharded_dim) if len(boxes) > 1 else boxes[0]
    return whole.narrow(shard.sharded_dim, 0, shard.global_shape[shard.sharded_dim])
