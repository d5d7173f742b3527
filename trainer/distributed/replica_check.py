"""Check that all data-parallel replicas have the same weights. This detects a faulty device that the loss does not reveal."""

from collections import Counter

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.mesh import Mesh, all_gather_values

CHUNK_ELEMENTS = 1 << 24
POSITION_MODULUS = 65_521
"""Elements are weighted by position modulo this prime, so that swapped elements change the checksum."""


def check_replicas(model: nn.Module, mesh: Mesh, step: int) -> None:
    """Raises: RuntimeError on all ranks, naming any ranks whose weights differ from those of most replicas.

    If no majority of the replicas agrees, the error names all of them.
    """
    sums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    gathered = all_gather_values([mesh.tp_rank, sums])
    mismatches = []
    for tp_rank in range(mesh.tp_size):
        replicas = {rank: theirs for rank, (their_tp_rank, theirs) in enumerate(gathered) if their_tp_rank == tp_rank}
        for name in sums:
            [(majority, num_equal)] = Counter(theirs[name] for theirs in replicas.values()).most_common(1)
            has_majority = 2 * num_equal > len(replicas)  # otherwise it is unknown which are right
            differing = [rank for rank, theirs in replicas.items() if not has_majority or theirs[name] != majority]
            if differing:
                mismatches.append((differing, name))
    if mismatches:
        ranks = sorted({rank for odd, _ in mismatches for rank in odd})
        rank_list = ", ".join(map(str, ranks))
        raise RuntimeError(
            f"step {step}: the weights of {'rank' if len(ranks) == 1 else 'ranks'} {rank_list} differ from those of the other "
            f"replicas ({len(mismatches)} of {len(sums)} tensors, the first is {mismatches[0][1]}), so a device computes wrong "
            "results; remove that device from the launch; nothing of this step was saved"
        )


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Compute a checksum modulo 2^64. Changing any one bit of the tensor changes it."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS].long()
        positions = torch.arange(start, start + len(chunk), device=chunk.device) % POSITION_MODULUS + 1
        total += (chunk * positions).sum()
    return int(total)
