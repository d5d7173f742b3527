"""How a rank's tensor lies in the global one. Pure arithmetic on shapes; nothing here communicates.

Three shapes of one parameter: *true* (what the config says and checkpoints and exports hold), *padded* (the true shape with
the divided dim rounded up, zeros at its end) and *local* (one tensor-parallel rank's equal share of the padded one). A fused
parameter has one more dim globally than locally: gate and up are `[2, ffn, width]` globally, `[2 * ffn_local, width]` locally.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Shard:
    shape: tuple[int, ...]
    """True global shape."""
    dim: int | None = None
    """The dim that tensor parallelism divides; None where every rank holds the whole tensor."""
    padded_size: int = 0
    """Size of that dim after padding."""

    def box_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of one rank's share, with the dims of the global tensor."""
        if self.dim is None:
            return self.shape
        share = self.padded_size // tp_size
        return (*self.shape[: self.dim], share, *self.shape[self.dim + 1 :])


def local_part(shard: Shard, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The rank's box of the true global tensor, zeros where padding lies."""
    assert tuple(full.shape) == shard.shape, f"{tuple(full.shape)} is not {shard.shape}"
    if shard.dim is None:
        return full
    missing = shard.padded_size - shard.shape[shard.dim]
    if missing:
        # torch's pad counts dims from the last, two numbers each.
        full = pad(full, [0, 0] * (full.dim() - 1 - shard.dim) + [0, missing])
    return full.chunk(tp_size, dim=shard.dim)[tp_rank]
