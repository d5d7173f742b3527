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


def parallel_cross_entropy(
    hidden_states: Float[Tensor, "seq rows hidden_size"],
    weight: Float[Tensor, "vocab_local hidden_size"],
    targets: Int64[Tensor, "seq rows"],
    *,
    vocab_size: int,
    scale: float,
    mesh: Mesh,
) -> Float32[Tensor, "seq rows"]:
    """Minus the log-probability of each target among the true `vocab_size` ids, of logits scale * hidden @ weight.T.

    The same on every tensor-parallel rank; its gradient is to be that of one rank's losses, not of their sum over ranks. The
    gradient of hidden is this rank's part (`copy_to_tp` adds the parts up). No logits are kept, nor ever all at once there.

    Units: nats.
    """
    first_index = mesh.tp_rank * len(weight)
    num_valid_columns = min(max(vocab_size - first_index, 0), len(weight))
    local_targets = (targets - first_index).flatten()
    parts = linear_cross_entropy(
        hidden_states.flatten(0, 1), weight, local_targets, num_valid_columns=num_valid_columns, scale=scale
    )
    return _combine_over_ranks(*parts, mesh).view(targets.shape)


def _combine_over_ranks(
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
        global_maximum = maximum.clone()
        torch.distributed.all_reduce(global_maximum, torch.distributed.ReduceOp.MAX, get_tensor_model_parallel_group())
        parts = torch.stack((total * (maximum - global_maximum).exp(), target_logit))
        maximum, (total, target_logit) = global_maximum, reduce_from_tensor_model_parallel_region(parts)
    return (maximum - target_logit + total.log()).float()
