"""Whether the data-parallel replicas hold the same weights: a device that computes wrong shows here, and nowhere in a loss."""

from collections import Counter

import torch
from torch import Tensor, nn

from tandem.trainer.distributed.mesh import Mesh, gather_to_all

CHUNK_ELEMENTS = 1 << 24
MODULUS = 65_521
"""Places are weighted by their number modulo this prime, so that two that have changed places show too."""


def check_replicas(model: nn.Module, mesh: Mesh, step: int) -> None:
    """Raises RuntimeError, on all ranks, naming those whose weights are not the bits that most of their replicas hold.

    Where no half of the replicas agrees, all of them are named.
    """
    sums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    said = gather_to_all((mesh.tp_rank, sums))
    found = []
    for tp_rank in range(mesh.tp_size):
        replicas = {rank: theirs for rank, (place, theirs) in enumerate(said) if place == tp_rank}
        for name in sums:
            [(usual, times)] = Counter(theirs[name] for theirs in replicas.values()).most_common(1)
            most = 2 * times > len(replicas)  # else it cannot be told which of them are right
            odd = [rank for rank, theirs in replicas.items() if not most or theirs[name] != usual]
            if odd:
                found.append((odd, name))
    if found:
        ranks = sorted({rank for odd, _ in found for rank in odd})
        named = ", ".join(map(str, ranks))
        raise RuntimeError(
            f"step {step}: the weights of {'rank' if len(ranks) == 1 else 'ranks'} {named} are not those of the other replicas "
            f"({len(found)} of {len(sums)} tensors, first {found[0][1]}): a device has computed wrong; take it out of the "
            "launch; nothing of this step was saved"
        )


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A number, modulo 2^64, that changes with any one bit of the tensor."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), CHUNK_ELEMENTS):
        part = bits[start : start + CHUNK_ELEMENTS].long()
        places = torch.arange(start, start + len(part), device=part.device) % MODULUS + 1
        total += (part * places).sum()
    return int(total)
