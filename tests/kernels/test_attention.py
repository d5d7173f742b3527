"""Attention against its definition, written out key by key in fp64."""

import math

import pytest
import torch

from tandem.kernels import attention as module
from tandem.kernels.attention import alibi_slopes, attention
from tandem.kernels.documents import document_starts as starts_of_documents

SHAPES = [(1, 1, 1, 1, 2), (2, 5, 4, 2, 3), (2, 33, 4, 4, 20), (1, 64, 6, 2, 80)]
"""rows, seq, heads, num_kv_heads, head_dim"""
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["plain", "alibi"])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["row", "documents"])


def definition(query, key, value, *, scale, slopes, document_starts):
    query, key, value = query.double(), key.double(), value.double()
    rows, queries, heads, _ = query.shape
    group, first = heads // key.shape[2], key.shape[1] - queries
    mixed = torch.zeros_like(query)
    for row in range(rows):
        for head in range(heads):
            for to in range(first, first + queries):
                seen = list(range(0 if document_starts is None else int(document_starts[row, to]), to + 1))
                scores = scale * key[row, seen, head // group] @ query[row, to - first, head]
                if slopes is not None:
                    slope = slopes.expand(rows, heads)[row, head].double()
                    scores = scores - slope * (to - torch.tensor(seen))
                mixed[row, to - first, head] = scores.softmax(0) @ value[row, seen, head // group]
    return mixed


def example(shape, generator, *, biased, masked, dtype=torch.float32, device="cpu"):
    rows, seq, heads, num_kv_heads, head_dim = shape
    tensors = [
        torch.randn(rows, seq, count, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, num_kv_heads, num_kv_heads)
    ]
    documents = (torch.rand(rows, seq, generator=generator) < 0.2).cumsum(1).int()
    return tensors, {
        "scale": 1 / math.sqrt(head_dim),
        "slopes": alibi_slopes(heads).to(device) if biased else None,
        "document_starts": starts_of_documents(documents.to(device)) if masked else None,
    }


def with_gradients(function, tensors, settings, output_gradient):
    result = function(*tensors, **settings)
    return result, *torch.autograd.grad(result, tensors, output_gradient.to(result.dtype))


def close(found, true):
    """Allow an error of sixteen fp32 roundings of the largest number."""
    found, true = ([x.detach().double() for x in many] for many in (found, true))
    limit = 16 * 2**-24 * max(float(exact.abs().max()) for exact in true)
    torch.testing.assert_close(found, true, rtol=0, atol=limit)


@BIASED
@MASKED
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_the_definition(shape, biased, masked, generator):
    tensors, settings = example(shape, generator, biased=biased, masked=masked)
    output_gradient = torch.randn(tensors[0].shape, generator=generator)
    ours = with_gradients(attention, tensors, settings, output_gradient)
    exact = with_gradients(definition, tensors, settings, output_gradient)
    close(ours, exact)


@BIASED
@MASKED
@pytest.mark.parametrize("queries", [1, 3])
def test_fewer_queries_than_keys_are_the_last_positions(queries, biased, masked, generator):
    (query, key, value), settings = example((2, 11, 4, 2, 6), generator, biased=biased, masked=masked)
    found = attention(query[:, -queries:], key, value, **settings)
    torch.testing.assert_close(found, attention(query, key, value, **settings)[:, -queries:])
    exact = definition(query[:, -queries:], key, value, **settings)
    close([found], [exact])


@MASKED
def test_each_row_may_have_its_own_slopes(masked, generator):
    tensors, settings = example((2, 9, 4, 2, 16), generator, biased=True, masked=masked)
    settings["slopes"] = settings["slopes"] / torch.tensor([[1.0], [2.5]])
    close([attention(*tensors, **settings)], [definition(*tensors, **settings)])


@BIASED
@MASKED
def test_rows_of_several_blocks_are_as_of_one(biased, masked, generator, monkeypatch):
    tensors, settings = example((2, 33, 4, 2, 20), generator, biased=biased, masked=masked)
    output_gradient = torch.randn(tensors[0].shape, generator=generator)
    whole = with_gradients(attention, tensors, settings, output_gradient)
    monkeypatch.setattr(module, "QUERY_BLOCK_SIZE", 8)
    close(with_gradients(attention, tensors, settings, output_gradient), whole)


@BIASED
@MASKED
def test_gradients_are_exact_in_double(biased, masked, generator):
    tensors, settings = example((1, 5, 2, 1, 3), generator, biased=biased, masked=masked, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: attention(*tensors, **settings), tensors)


@BIASED
@MASKED
def test_bf16_error_is_one_rounding_of_the_weights_and_one_of_the_result(biased, masked, generator):
    tensors, settings = example((2, 40, 4, 2, 16), generator, biased=biased, masked=masked, dtype=torch.bfloat16)
    error = (attention(*tensors, **settings).double() - definition(*tensors, **settings)).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * tensors[2].abs().max()


def test_bf16_queries_still_tell_far_distances_apart():
    """Two keys at distances 999 and 1,000 have equal scores; a bias in bf16 would give them equal weights."""
    seq, slope = 1_001, 0.840896
    query = torch.ones(1, seq, 1, 2, dtype=torch.bfloat16)
    key, value = torch.zeros_like(query), torch.zeros_like(query)
    key[:, :2], value[:, 1] = 1_024, 1
    mixed = attention(query, key, value, scale=1.0, slopes=torch.tensor([slope]), document_starts=None)
    # 2^-8 for the result's rounding, and as much for that of the weights.
    assert mixed[0, -1, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-slope)), rel=2**-7)


@BIASED
def test_nothing_reaches_a_token_from_its_future_or_from_other_documents(biased, generator):
    tensors, settings = example((1, 12, 2, 1, 4), generator, biased=biased, masked=True)
    settings["document_starts"] = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    before = attention(*tensors, **settings)
    with torch.no_grad():
        for tensor in tensors:
            tensor[:, :5] += 1
            tensor[:, 9:] += 1
    assert torch.equal(attention(*tensors, **settings)[:, 5:9], before[:, 5:9])


def test_inputs_are_unchanged_and_the_bits_repeat(generator):
    tensors, settings = example((2, 33, 4, 2, 20), generator, biased=True, masked=True)
    before = [tensor.detach().clone() for tensor in tensors]
    output_gradient = torch.randn(tensors[0].shape, generator=generator)
    runs = [with_gradients(attention, tensors, settings, output_gradient) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_backward_keeps_no_scores(generator):
    """Keeps query, key, value, result, one number per query and head, slopes and document starts."""
    tensors, settings = example((2, 33, 4, 2, 20), generator, biased=True, masked=True, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attention(*tensors, **settings)
    addresses = [x.data_ptr() for x in (*tensors, out, settings["slopes"], settings["document_starts"])]
    assert sorted(x.data_ptr() for x in kept if x.shape != (2, 4, 33)) == sorted(addresses)
    assert [x.dtype for x in kept if x.shape == (2, 4, 33)] == [torch.float32]


def test_heads_join_without_a_copy(generator):
    tensors, settings = example((2, 5, 4, 2, 16), generator, biased=True, masked=False)
    assert attention(*tensors, **settings).flatten(2).transpose(0, 1).is_contiguous()


def test_what_cannot_be_honoured_is_refused(generator):
    (query, key, value), settings = example((2, 5, 4, 2, 16), generator, biased=True, masked=False)
    with pytest.raises(ValueError, match="5 queries of 4 keys"):
        attention(query, key[:, :4], value[:, :4], **settings)
    with pytest.raises(ValueError, match="must be positive"):
        attention(query, key, value, **settings | {"scale": 0.0})


def test_slopes_are_powers_of_two_and_every_second_of_the_next_list():
    assert alibi_slopes(8).tolist() == [2**-i for i in range(1, 9)]
    assert alibi_slopes(32)[[0, 3, 31]].tolist() == pytest.approx([2**-0.25, 0.5, 2**-8])
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(1).tolist() == [2**-8]


@pytest.mark.gpu
@BIASED
@MASKED
def test_gpu_error_of_few_queries_is_that_of_bf16(biased, masked, generator):
    (query, key, value), settings = example(
        (2, 1_001, 32, 8, 80), generator, biased=biased, masked=masked, dtype=torch.bfloat16, device="cuda"
    )
    query, slopes = query[:, -3:], settings["slopes"]
    settings["slopes"] = slopes / torch.tensor([[1.0], [2.5]], device="cuda") if biased else None
    found = attention(query, key, value, **settings)
    settings = {name: x.cpu() if torch.is_tensor(x) else x for name, x in settings.items()}
    exact = attention(*(x.detach().cpu().double() for x in (query, key, value)), **settings)
    assert (found.cpu() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * value.abs().max()
