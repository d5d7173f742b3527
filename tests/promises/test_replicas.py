"""A replica whose weights are not the others' is found and named."""

from pathlib import Path

import pytest
import torch

from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.distributed.replica_check import check_replicas, checksum
from tandem.trainer.startup import build_engine
from tests import ranks, tiny_configs


def flipped(folder: Path) -> list[str]:
    """What is said of one bit on rank 3, of weights that have changed places on it, and of one of two replicas."""
    with mesh_context(1) as mesh:
        model = build_engine(tiny_configs.make_config("btlm"), mesh, None).model
        check_replicas(model, mesh, 7)
        said = []
        weight = model.layers[1].ffn.down.weight.detach().view(-1)
        for break_it in (flip, swap):
            kept = weight.clone()
            if mesh.rank == 3:
                break_it(weight)
            with pytest.raises(RuntimeError) as error:
                check_replicas(model, mesh, 7)
            said.append(str(error.value))
            weight.copy_(kept)
    with mesh_context(2) as mesh:
        model = build_engine(tiny_configs.make_config("btlm", parallel={"tp_size": 2}), mesh, None).model
        check_replicas(model, mesh, 7)  # halves differ, replicas do not
        if mesh.rank == 1:
            flip(next(model.parameters()).detach().view(-1))
        with pytest.raises(RuntimeError) as error:
            check_replicas(model, mesh, 7)
        said.append(str(error.value))
    return said


def flip(weight: torch.Tensor) -> None:
    weight.view(torch.int32)[5] ^= 1


def swap(weight: torch.Tensor) -> None:
    weight[[3, 4]] = weight[[4, 3]]


@pytest.mark.dist
def test_the_odd_ranks_are_named_on_all(tmp_path):
    answers = ranks.run(flipped, 4, tmp_path, tmp_path)
    assert answers[0] == answers[1] == answers[2] == answers[3]
    one_bit, swapped, halves = answers[0]
    assert one_bit.startswith("step 7: the weights of rank 3 differ from those of the other replicas (1 of ")
    assert "the first is layers.1.ffn.down.weight" in one_bit
    assert swapped.startswith("step 7: the weights of rank 3 differ")
    assert halves.startswith("step 7: the weights of ranks 1, 3 differ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_tensor_is_in_its_sum(dtype, generator):
    tensor = torch.randn((3, 7), generator=generator).to(dtype)
    bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    before, size = checksum(tensor), 8 * dtype.itemsize
    for index in range(len(bits)):
        for bit in range(size):
            mask = torch.tensor(-(1 << bit) if bit == size - 1 else 1 << bit, dtype=bits.dtype)
            bits[index] ^= mask
            assert checksum(tensor) != before
            bits[index] ^= mask
    assert checksum(tensor) == before
