"""Queries, keys and values against a definition in fp64 that rotates pairs as complex numbers."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tandem.kernels.qkv import split_and_rotate_qkv, split_qkv
from tandem.kernels.rope import rotary_table

BASE, EPSILON = 10_000.0, 1e-5
TABLE = 2**-25 * 4_096**0.5
"""Entries of the table are fp32, off by half a unit. A sum of so many products of order one is off by no more than this."""
SHAPES = pytest.mark.parametrize(
    ("head_dim", "rotary_dims", "queries", "num_kv_heads"),
    [(2, 2, 1, 2), (7, 4, 2, 3), (40, 40, 1, 1), (160, 40, 4, 1)],
)
NORMED = pytest.mark.parametrize("normed", [False, True])


def definition(qkv, place, rotary_dims, head_dim, queries, norms):
    """Each group has its queries, a key and a value."""
    seq, rows, _ = qkv.shape
    groups = qkv.double().reshape(seq, rows, -1, queries + 2, head_dim).transpose(0, 1)
    half = rotary_dims // 2
    angles = place[..., None].double() * BASE ** (-2 * torch.arange(half, dtype=torch.float64) / rotary_dims)
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]
    turned = []
    for heads, weight in zip((groups[..., :queries, :].flatten(2, 3), groups[..., queries, :]), norms, strict=True):
        if weight is not None:
            centred = heads - heads.mean(-1, keepdim=True)
            heads = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
        pairs = torch.complex(heads[..., :half], heads[..., half:rotary_dims]) * turn
        turned.append(torch.cat((pairs.real, pairs.imag, heads[..., rotary_dims:]), dim=-1))
    return *turned, groups[..., queries + 1, :]


def example(head_dim, queries, num_kv_heads, normed, generator, dtype=torch.float64, rows=2, seq=5):
    """The fused buffer and the norms' weights."""
    shapes = [
        (seq, rows, num_kv_heads * (queries + 2) * head_dim),
        (num_kv_heads * queries, head_dim),
        (num_kv_heads, head_dim),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in tensors[: 3 if normed else 1]]
    return leaves[0], leaves[1:] if normed else [None, None]


def evaluated(function, qkv, norms, generator):
    """Return results and gradients in fp64."""
    results = function()
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(qkv.dtype) for x in results]
    leaves = [x for x in (qkv, *norms) if x is not None]
    gradients = torch.autograd.grad(results, leaves, [seed.to(x) for seed, x in zip(seeds, results, strict=True)])
    return [x.detach().double() for x in (*results, *gradients)]


def rotated(qkv, place, rotary_dims, head_dim, queries, norms):
    return split_and_rotate_qkv(
        qkv, *rotary_table(place, rotary_dims, BASE), head_dim=head_dim, num_queries_per_kv=queries,
        query_norm=norms[0], key_norm=norms[1], norm_eps=EPSILON,
    )  # fmt: skip


@SHAPES
@NORMED
@pytest.mark.parametrize("rows_of_table", [1, 2])
def test_results_and_gradients_are_the_definition(
    head_dim, rotary_dims, queries, num_kv_heads, normed, rows_of_table, generator
):
    qkv, norms = example(head_dim, queries, num_kv_heads, normed, generator)
    place = torch.randint(4_096, (rows_of_table, 5), generator=generator)
    found, exact = (
        evaluated(lambda f=f: f(qkv, place, rotary_dims, head_dim, queries, norms), qkv, norms, generator.clone_state())
        for f in (rotated, definition)
    )
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=TABLE)


@NORMED
def test_gradients_are_exact_in_double(normed, generator):
    qkv, norms = example(6, 2, 1, normed, generator, seq=3)
    place = torch.tensor([[3, 4, 9]])
    leaves = [qkv, *norms] if normed else [qkv]
    assert torch.autograd.gradcheck(lambda x, *w: rotated(x, place, 4, 6, 2, w or norms), leaves)


@NORMED
def test_bf16_results_are_the_fp64_results_rounded_once(normed, generator):
    qkv, norms = example(40, 2, 2, normed, generator, torch.bfloat16)
    place = torch.arange(5)[None] + 2_000
    for mine, true in zip(rotated(qkv, place, 10, 40, 2, norms), definition(qkv, place, 10, 40, 2, norms), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=0.51 * 2**-7, atol=TABLE)


def test_what_is_not_rotated_passes_bit_for_bit(generator):
    qkv, norms = example(16, 1, 2, False, generator, torch.bfloat16)
    query, key, value = rotated(qkv, torch.arange(5)[None] + 100, 4, 16, 1, norms)
    plain = split_qkv(qkv, head_dim=16, num_queries_per_kv=1)
    assert torch.equal(query[..., 4:], plain[0][..., 4:])
    assert torch.equal(key[..., 4:], plain[1][..., 4:])
    assert torch.equal(value, plain[2])
    assert not torch.equal(query[..., :4], plain[0][..., :4])


def test_scores_depend_on_the_distance_alone(generator):
    qkv = torch.randn(1, 1, 60, generator=generator, dtype=torch.float64)

    def score(to: int, source: int) -> float:
        query, key = (rotated(qkv, torch.tensor([[p]]), 20, 20, 1, (None, None)) for p in (to, source))
        return (query[0] * key[1]).sum().item()

    # The table is fp32, so each of twenty products carries its rounding.
    assert score(5, 2) == pytest.approx(score(4_005, 4_002), abs=20 * torch.finfo(torch.float32).eps * 10)
    assert abs(score(5, 2) - score(5, 3)) > 0.01


@NORMED
def test_a_document_is_rotated_as_if_it_were_alone(normed, generator):
    qkv, norms = example(8, 2, 1, normed, generator, rows=1)
    together = rotated(qkv, torch.tensor([[0, 1, 2, 0, 1]]), 4, 8, 2, norms)
    for tokens in (slice(0, 3), slice(3, 5)):
        alone = rotated(qkv[tokens], torch.arange(len(qkv[tokens]))[None], 4, 8, 2, norms)
        assert all(torch.equal(a, b[:, tokens]) for a, b in zip(alone, together, strict=True))


@NORMED
def test_backward_keeps_the_projection_only_for_the_norms(normed, generator):
    qkv, norms = example(8, 2, 2, normed, generator, torch.bfloat16)
    cos, sin = rotary_table(torch.arange(5)[None], 4, BASE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        split_and_rotate_qkv(
            qkv, cos, sin, head_dim=8, num_queries_per_kv=2, query_norm=norms[0], key_norm=norms[1], norm_eps=EPSILON
        )
    wanted = [cos, sin] + ([qkv, *norms] if normed else [])
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in wanted)


@NORMED
def test_inputs_are_unchanged_and_the_bits_repeat(normed, generator):
    qkv, norms = example(8, 2, 2, normed, generator, torch.bfloat16)
    inputs = [x for x in (qkv, *norms) if x is not None]
    before = [x.detach().clone() for x in inputs]
    first, second = (
        evaluated(lambda: rotated(qkv, torch.arange(5)[None], 4, 8, 2, norms), qkv, norms, generator.clone_state())
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("queries", [1, 3])
def test_the_plain_split_is_the_definition(queries, generator):
    qkv, norms = example(4, queries, 2, False, generator)
    found, exact = (
        evaluated(f, qkv, norms, generator.clone_state())
        for f in (
            lambda: split_qkv(qkv, head_dim=4, num_queries_per_kv=queries),
            lambda: definition(qkv, torch.zeros(1, 5), 0, 4, queries, norms),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


class Allocations(TorchDispatchMode):
    """Count the elements of every tensor that an operation makes, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor):
            self.elements.append(out.numel())
        return out


def test_the_plain_split_copies_nothing_forward_and_each_gradient_once_backward(generator):
    qkv, _ = example(4, 1, 2, False, generator)
    with Allocations() as forward:
        heads = split_qkv(qkv, head_dim=4, num_queries_per_kv=1)
    assert forward.elements == []
    assert {x.untyped_storage().data_ptr() for x in heads} == {qkv.untyped_storage().data_ptr()}
    with Allocations() as backward:
        (gradient,) = torch.autograd.grad(heads, qkv, [torch.ones_like(x) for x in heads])
    assert [n for n in backward.elements if n > heads[0].numel()] == [qkv.numel()]
    assert gradient.is_contiguous()


def test_the_plain_split_may_be_computed_again_and_compiled(generator):
    qkv, norms = example(4, 1, 2, False, generator)

    def function(split=split_qkv) -> tuple[torch.Tensor, ...]:
        return tuple(x.sin() for x in split(qkv, head_dim=4, num_queries_per_kv=1))

    # Annotation checks, which only tests have, cannot run on traced tensors.
    compiled = torch.compile(lambda: function(inspect.unwrap(split_qkv)), backend="aot_eager")
    ways = [function, lambda: checkpoint(function, use_reentrant=False), compiled]
    plain, *others = (evaluated(way, qkv, norms, generator.clone_state()) for way in ways)
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))
