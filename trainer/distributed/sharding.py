"""Position of a rank's tensor in the global one. Pure arithmetic on shapes, without communication.

A parameter has three shapes:

* *global*: the unpadded shape, as in the config, checkpoints and exports,
* *padded*: the global shape with the sharded dim rounded up; the padding is zeros at its end,
* *local*: one tensor-parallel rank's equal share of the padded tensor.

A fused parameter has one more dim globally than locally: gate and up are `[2, ffn_hidden_size, hidden_size]` globally and
`[2 * ffn_hidden_size_local, hidden_size]` locally.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class TensorSharding:
    global_shape: tuple[int, ...]
    sharded_dim: int | None = None
    """The dim that tensor parallelism divides; None if the tensor is replicated."""
    padded_size: int = 0
    """Padded size of that dim."""

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Return the shape of one rank's share, with the dims of the global tensor."""
        if self.sharded_dim is None:
            return self.global_shape
        local_size = self.padded_size // tp_size
        return (*self.global_shape[: self.sharded_dim], local_size, *self.global_shape[self.sharded_dim + 1 :])


def slice_local(sharding: TensorSharding, global_tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Return the rank's share of an unpadded global tensor, with zeros for padding."""
    assert tuple(global_tensor.shape) == sharding.global_shape, (
        f"{tuple(global_tensor.shape)} is not {sharding.global_shape}"
    )
    if sharding.sharded_dim is None:
        return global_tensor
    num_padding = sharding.padded_size - sharding.global_shape[sharding.sharded_dim]
    if num_padding:
        # torch's pad counts dims from the last, two numbers each.
        global_tensor = pad(global_tensor, [0, 0] * (global_tensor.dim() - 1 - sharding.sharded_dim) + [0, num_padding])
    return global_tensor.chunk(tp_size, dim=sharding.sharded_dim)[tp_rank]
