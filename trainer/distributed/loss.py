"""Cross-entropy of the output matrix's logits, its vocabulary divided over ranks, in fp32, padding left out of the softmax.

Each rank finds three numbers per token for its part of the vocabulary (`tandem.kernels.linear_cross_entropy`), r its rank:

    loss = M - sum over r of target_logit[r] + log(sum over r of total[r] * exp(maximum[r] - M)),   M = max of maximum[r]
"""

import torch
from jaxtyping import Float, Float32, Int64
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from tandem.kernels.linear_cross_entropy import linear_cross_entropy
from tandem.trainer.distributed.mesh import Mesh


def cross_entropy(
    hidden: Float[Tensor, "seq rows width"],
    weight: Float[Tensor, "vocab_local width"],
    targets: Int64[Tensor, "seq rows"],
    *,
    vocab: int,
    scale: float,
    mesh: Mesh,
) -> Float32[Tensor, "seq rows"]:
    """Minus the log-probability of each target among the true `vocab` ids, of logits scale * hidden @ weight.T.

    The same on every tensor-parallel rank; its gradient is to be that of one rank's losses, not of their sum over ranks. The
    gradient of hidden is this rank's part (`to_columns` adds the parts up). No logits are kept, nor ever all at once there.

    Units: nats.
    """
    first = mesh.tp_rank * len(weight)
    columns = min(max(vocab - first, 0), len(weight))
    local = (targets - first).flatten()
    parts = linear_cross_entropy(hidden.flatten(0, 1), weight, local, columns=columns, scale=scale)
    return _over_ranks(*parts, mesh).view(targets.shape)


def _over_ranks(
    maximum: Float[Tensor, " tokens"],
    total: Float[Tensor, " tokens"],
    target_logit: Float[Tensor, " tokens"],
    mesh: Mesh,
) -> Float32[Tensor, " tokens"]:
    """The loss of each token, from every rank's part. A rank that holds padding alone has the lowest number and no total.

    In fp64, which costs nothing for so few numbers: a rounding here is one error for all of a token's columns in backward.
    """
    maximum, total, target_logit = maximum.double(), total.double(), target_logit.double()
    if mesh.tp_size > 1:
        largest = maximum.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, get_tensor_model_parallel_group())
        parts = torch.stack((total * (maximum - largest).exp(), target_logit))
        maximum, (total, target_logit) = largest, reduce_from_tensor_model_parallel_region(parts)
    return (maximum - target_logit + total.log()).float()
