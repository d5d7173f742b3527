"""Parameters in shares: given their initial values, saved, and put together again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.trainer.checkpoint.async_save import CheckpointSaver
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.distributed.sharding import TensorSharding
from tandem.trainer.models.init import initial_values, load_parameter
from tandem.trainer.models.mup import ParameterRule


def fill(model: nn.Module, table: dict[str, ParameterRule], *, seed: int, truncation_sigmas: float, mesh: Mesh) -> None:
    """Every parameter holds its rank's part of its initial value, as those of a new run do; padding is zero."""
    value = initial_values(model, table, seed=seed, truncation_sigmas=truncation_sigmas)
    for name, parameter in model.named_parameters():
        load_parameter(parameter, value(name), mesh)


def save_checkpoint(root: Path, step: int, engine: Engine, mesh: Mesh, *, metadata: dict[str, Any]) -> None:
    """Save a checkpoint of `step` into `root` and wait until it is committed. All others are kept."""
    saver = CheckpointSaver(root, mesh, keep_last=0)
    saver.start_save(step, engine, metadata)
    assert saver.wait_for_result().error is None


def joined(shard: TensorSharding, parts: list[Tensor]) -> Tensor:
    """The true global tensor from every rank's local one, in rank order; padding is dropped. Of one part it is a view."""
    if shard.sharded_dim is None:
        return parts[0].reshape(shard.global_shape)
    box = shard.local_shape(len(parts))
    boxes = [part.reshape(box) for part in parts]
    whole = torch.cat(boxes, dim=shard.sharded_dim) if len(boxes) > 1 else boxes[0]
    return whole.narrow(shard.sharded_dim, 0, shard.global_shape[shard.sharded_dim])
