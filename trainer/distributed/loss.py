"""Vocabulary-parallel cross-entropy in fp32. The softmax excludes padding.

Each rank r computes three numbers per token for its part of the vocabulary (`tandem.kernels.linear_cross_entropy`). Then

    loss = M - sum over r of target_logit[r] + log(sum over r of total[r] * exp(maximum[r] - M)),   M = max of maximum[r]
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from tandem.kernels.linear_cross_entropy import linear_cross_entropy
from tandem.trainer.distributed.megatron import parallel_state, tensor_parallel
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
    """Compute -log(probability) of each target. The logits of the first `vocab_size` ids are scale * hidden_states @ weight.T.

    Every tensor-parallel rank returns the same losses. The gradient of `hidden_states` is this rank's part; `copy_to_tp` sums
    the parts. The logits are never all in memory at once, and none are kept.
    Units: nats.
    Note: pass the gradient of one rank's losses to backward, not of their sum over ranks.
    """
    first_index = mesh.tp_rank * len(weight)
    num_valid_columns = min(max(vocab_size - first_index, 0), len(weight))
    local_targets = (targets - first_index).flatten()
    parts = linear_cross_entropy(
        hidden_states.flatten(0, 1), weight, local_targets, num_valid_columns=num_valid_columns, scale=scale
    )
    # fp64 is cheap for so few numbers, and a rounding error here would affect all of a token's columns in backward.
    maximum, total, target_logit = (part.double() for part in parts)
    if mesh.tp_size > 1:  # a rank that has only padding has the lowest number as its maximum, and a total of 0
        global_maximum = maximum.clone()
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(global_maximum, torch.distributed.ReduceOp.MAX, group)
        terms = torch.stack((total * (maximum - global_maximum).exp(), target_logit))
        maximum, (total, target_logit) = global_maximum, tensor_parallel.reduce_from_tensor_model_parallel_region(terms)
    return (maximum - target_logit + total.log()).float().view(targets.shape)
