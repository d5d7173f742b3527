"""Global, padded and local shapes hold the same numbers."""

from math import prod

import pytest
import torch

from tandem.trainer.distributed.sharding import TensorSharding, slice_local
from tests.sharded import joined

SHARDS = {
    "vocab": TensorSharding((101, 6), 0, 128),
    "inputs": TensorSharding((6, 101), 1, 128),
    "fused": TensorSharding((2, 101, 6), 1, 128),
    "fused bias": TensorSharding((2, 101), 1, 128),
    "no padding": TensorSharding((96, 6), 0, 96),
    "a rank of padding only": TensorSharding((30, 6), 0, 128),
}
every_shard = pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
every_tp_size = pytest.mark.parametrize("tp_size", [1, 2, 4])


def full(shard: TensorSharding) -> torch.Tensor:
    """Make a tensor of distinct numbers, none of them zero."""
    return torch.arange(1.0, 1 + prod(shard.global_shape)).view(shard.global_shape)


@every_shard
@every_tp_size
def test_joined_parts_are_the_whole(shard, tp_size):
    """Parts may have the flat or fused shape of a parameter."""
    parts = [slice_local(shard, full(shard), tp_rank, tp_size) for tp_rank in range(tp_size)]
    assert torch.equal(joined(shard, parts), full(shard))
    assert torch.equal(joined(shard, [part.flatten() for part in parts]), full(shard))
    assert all(tuple(part.shape) == shard.local_shape(tp_size) for part in parts)


@every_shard
@every_tp_size
def test_parts_are_consecutive_and_padding_is_zero_at_the_end(shard, tp_size):
    share = shard.padded_size // tp_size
    for tp_rank in range(tp_size):
        part = slice_local(shard, full(shard), tp_rank, tp_size)
        true = min(max(shard.global_shape[shard.sharded_dim] - tp_rank * share, 0), share)
        mine = full(shard).narrow(shard.sharded_dim, min(tp_rank * share, shard.global_shape[shard.sharded_dim]), true)
        assert torch.equal(part.narrow(shard.sharded_dim, 0, true), mine)
        assert not part.narrow(shard.sharded_dim, true, share - true).any()


def test_each_rank_has_its_part_of_gate_and_of_up():
    """Slicing the fused dim would give the gate to one rank and up to the other."""
    gate_up = torch.stack([torch.full((101, 6), 1.0), torch.full((101, 6), 2.0)])
    for tp_rank in (0, 1):
        part = slice_local(SHARDS["fused"], gate_up, tp_rank, 2)
        assert (float(part[0].max()), float(part[1].max())) == (1.0, 2.0)


@every_tp_size
def test_a_replicated_tensor_is_whole_everywhere(tp_size):
    shard = TensorSharding((7,))
    parts = [slice_local(shard, full(shard), tp_rank, tp_size) for tp_rank in range(tp_size)]
    assert all(torch.equal(part, full(shard)) for part in parts)
    assert torch.equal(joined(shard, parts), full(shard))
    assert shard.local_shape(tp_size) == (7,)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match=r"\(128, 6\) is not \(101, 6\)"):
        slice_local(SHARDS["vocab"], torch.zeros(128, 6), 0, 2)
