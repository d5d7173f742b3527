"""Cross-entropy over logits whose vocabulary is divided over ranks, in fp32, padding left out of the softmax."""

import torch
from jaxtyping import Float, Float32, Int64
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from trainer.parallel.mesh import Mesh


def cross_entropy(
    logits: Float[Tensor, "seq rows vocab_local"], targets: Int64[Tensor, "seq rows"], *, vocab: int, mesh: Mesh
) -> Float32[Tensor, "seq rows"]:
    """Minus the log-probability of each target among the true `vocab` ids; the same on every tensor-parallel rank.

    Units: nats.
    """
    logits = without_padding(logits.float(), vocab=vocab, mesh=mesh)
    return vocab_parallel_cross_entropy(logits, targets)


def without_padding(
    logits: Float[Tensor, "*batch vocab_local"], *, vocab: int, mesh: Mesh
) -> Float[Tensor, "*batch vocab_local"]:
    """Logits of ids that do not exist are minus infinity, so they have no probability and no gradient."""
    local = logits.shape[-1]
    first = mesh.tp_rank * local
    if first + local <= vocab:
        return logits
    ids = torch.arange(first, first + local, device=logits.device)
    return logits.masked_fill(ids >= vocab, float("-inf"))
