"""Parameters in shares: given their initial values, and put together again."""

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import Shard
from tandem.trainer.models.init import place, values
from tandem.trainer.models.mup import Rule


def fill(model: nn.Module, table: dict[str, Rule], *, seed: int, truncation_sigmas: float, mesh: Mesh) -> None:
    """Every parameter holds its rank's part of its initial value, as those of a new run do; padding is zero."""
    value = values(model, table, seed=seed, truncation_sigmas=truncation_sigmas)
    for name, parameter in model.named_parameters():
        place(parameter, value(name), mesh)


def joined(shard: Shard, parts: list[Tensor]) -> Tensor:
    """The true global tensor from every rank's local one, in rank order; padding is dropped. Of one part it is a view."""
    if shard.dim is None:
        return parts[0].reshape(shard.shape)
    box = shard.box_shape(len(parts))
    boxes = [part.reshape(box) for part in parts]
    whole = torch.cat(boxes, dim=shard.dim) if len(boxes) > 1 else boxes[0]
    return whole.narrow(shard.dim, 0, shard.shape[shard.dim])
