"""The kernels that split a fused projection, against their meaning in fp64."""

import pytest
import torch

import tandem.kernels.qkv  # noqa: F401, registers the meaning
from tandem.kernels.device.qkv import backward, forward

EPSILON = 1e-5
CASES = [
    # seq, rows, queries, num_kv_heads, head_dim, half, normed, rows of the table
    (1, 1, 1, 1, 2, 1, True, 1),
    (5, 2, 1, 2, 64, 8, False, 1),
    (3, 2, 4, 1, 160, 20, True, 2),
    (9, 3, 4, 1, 40, 20, True, 1),
    (131, 1, 1, 1, 6, 1, True, 1),
    (21, 2, 1, 1, 44, 20, False, 2),
]
ROUNDING = {torch.float32: 16 * 2**-24, torch.bfloat16: 0.51 * 2**-7}
"""Relative: a dozen fp32 operations in sequence; or one rounding to bf16, half a unit in the last place."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
PRODUCTION = [(4_096, 2, 4, 8, 160, 20, True), (4_096, 2, 1, 32, 64, 8, False)]


def example(seq, rows, queries, num_kv_heads, head_dim, half, normed, rows_of_table, generator, device, dtype):
    """Return the fused buffer, the norms' weights or None, the table, and gradients of queries, keys and values."""

    def random(*shape):
        return torch.randn(shape, generator=generator)

    heads, slots = num_kv_heads * queries, num_kv_heads * (queries + 2)
    norms = (random(heads, head_dim), random(num_kv_heads, head_dim)) if normed else (None, None)
    gradients = [random(rows, seq, number, head_dim) for number in (heads, num_kv_heads, num_kv_heads)]
    angles = 6 * random(rows_of_table, seq, half)
    qkv = 2 * random(seq, rows, slots * head_dim) + 1
    inputs, gradients = ([x if x is None else x.to(device, dtype) for x in many] for many in ((qkv, *norms), gradients))
    return *inputs, angles.cos().to(device), angles.sin().to(device), gradients


def exact(qkv, query_norm, key_norm, cos, sin, gradients):
    """Return results and gradients of the meaning in fp64, which tests/kernels/test_qkv.py compares with a definition."""
    qkv, query_norm, key_norm, cos, sin, *gradients = (
        None if x is None else x.cpu().double() for x in (qkv, query_norm, key_norm, cos, sin, *gradients)
    )
    head_dim, queries = gradients[0].shape[3], gradients[0].shape[2] // gradients[1].shape[2]
    results = torch.ops.tandem.split_and_rotate_qkv(qkv, cos, sin, query_norm, key_norm, EPSILON, head_dim, queries)
    kept = None if query_norm is None else qkv
    gradients = torch.ops.tandem.split_and_rotate_qkv_backward(
        *gradients, kept, cos, sin, query_norm, key_norm, EPSILON
    )
    return [*results, *gradients]


def found(qkv, query_norm, key_norm, cos, sin, gradients):
    head_dim, queries = gradients[0].shape[3], gradients[0].shape[2] // gradients[1].shape[2]
    results = forward(qkv, cos, sin, query_norm, key_norm, EPSILON, head_dim, queries)
    kept = None if query_norm is None else qkv
    return [*results, *backward(*gradients, kept, cos, sin, query_norm, key_norm, EPSILON)]


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_the_meaning_rounded_once(case, dtype, generator, device):
    tensors = example(*case, generator, device, dtype)
    pairs = list(zip(found(*tensors), exact(*tensors), strict=True))
    # Sums over pairs, heads and tokens cancel, so the rest may be off by a few roundings of the largest number.
    atol = 4 * 2**-24 * max(float(true.abs().max()) for _, true in pairs if true.numel())
    for mine, true in pairs:
        torch.testing.assert_close(mine.cpu().double(), true, rtol=ROUNDING[mine.dtype], atol=atol)
        assert mine.is_contiguous()


def test_other_layouts_are_read_as_if_they_were_contiguous(generator, device):
    tensors = example(3, 2, 2, 1, 8, 2, True, 1, generator, device, torch.float32)
    qkv, query_norm, key_norm, cos, sin, gradients = tensors
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (qkv, query_norm, key_norm, cos, sin)]
    turned_gradients = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in gradients]
    assert not any(x.is_contiguous() for x in (*turned[:2], *turned[3:], *turned_gradients))
    assert all(torch.equal(a, b) for a, b in zip(found(*tensors), found(*turned, turned_gradients), strict=True))


@pytest.mark.parametrize("normed", [False, True])
def test_inputs_are_unchanged_and_the_bits_repeat(normed, generator, device):
    tensors = example(35, 2, 2, 1, 8, 2, normed, 1, generator, device, torch.bfloat16)
    inputs = [x for x in (*tensors[:5], *tensors[5]) if x is not None]
    before = [x.clone() for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found(*tensors), found(*tensors), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def plain(qkv, query_norm, key_norm, cos, sin, gradients):
    """The same in plain torch, in the inputs' dtype, norm and rotation each rounded, as a model without kernels would."""
    query_gradient, key_gradient, value_gradient = gradients
    num_kv_heads, head_dim = value_gradient.shape[2:]
    leaves = [x.detach().requires_grad_() for x in (qkv, query_norm, key_norm) if x is not None]
    groups = leaves[0].transpose(0, 1).unflatten(-1, (num_kv_heads, -1, head_dim))
    heads = [groups[..., :-2, :].flatten(2, 3), groups[..., -2, :]]
    for index, weight in enumerate(leaves[1:]):
        heads[index] = torch.nn.functional.layer_norm(heads[index], (head_dim,), eps=EPSILON) * weight
    rotated = []
    for x in heads:
        first, second, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
        c, s = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
        rotated.append(torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1))
    results = [*rotated, groups[..., -1, :]]
    grads = torch.autograd.grad(results, leaves, [query_gradient, key_gradient, value_gradient])
    return [
        *(x.detach() for x in results),
        grads[0],
        torch.cat(grads[1:]) if query_norm is not None else qkv.new_empty(0),
    ]


def errors(tensors):
    """Yield the errors of the kernels and of plain torch, relative to plain torch in fp64, for each result and gradient."""
    *inputs, gradients = tensors
    wide = plain(*(x if x is None else x.double() for x in inputs), [x.double() for x in gradients])
    for mine, theirs, true in zip(found(*tensors), plain(*tensors), wide, strict=True):
        if true.numel():
            yield tuple(float((x.double() - true).norm() / true.norm()) for x in (mine, theirs))


@pytest.mark.parametrize("normed", [False, True])
def test_bf16_error_is_at_most_a_tenth_above_that_of_plain_torch(normed, generator, device):
    for mine, theirs in errors(example(7, 2, 2, 1, 40, 5, normed, 1, generator, device, torch.bfloat16)):
        assert mine <= 1.1 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("case", PRODUCTION)
def test_bf16_error_is_at_most_a_tenth_above_that_of_plain_torch_at_production_shapes(case, generator, device):
    for mine, theirs in errors(example(*case, 1, generator, device, torch.bfloat16)):
        assert mine <= 1.1 * theirs
