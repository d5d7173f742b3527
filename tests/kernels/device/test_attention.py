"""The attention kernels against the definition in fp64."""

import math

import pytest
import torch

from tandem.kernels.attention import _attention, _attention_backward, alibi_slopes, attention
from tandem.kernels.device import attention as kernels
from tandem.kernels.documents import document_starts

TILES = [(16, 16), (16, 32), (32, 16)]
"""Queries by keys, so small that rows of a few dozen tokens have several blocks."""
LENGTHS = torch.tensor([[16, 1, 14, 1, 1, 8, 6], [3, 12, 2, 1, 20, 8, 1]])
"""Lengths of documents: some start with a block, some one token before or after, some have one token, some cross a border."""


def sizes(tile):
    return {"QUERIES": tile[0], "KEYS": tile[1], "num_warps": 4, "num_stages": 1}


def documents(seq):
    return torch.stack([torch.arange(7).repeat_interleave(lengths)[:seq] for lengths in LENGTHS])


def example(shape, generator, device, *, biased, masked, dtype=torch.float32):
    """Return query, key, value, out gradient; and scale, slopes of each row, starts. LENGTHS limits the length of rows."""
    seq, heads, num_kv_heads, head_dim = shape
    tensors = [
        torch.randn(2, seq, count, head_dim, generator=generator).to(device, dtype)
        for count in (heads, num_kv_heads, num_kv_heads, heads)
    ]
    slopes = alibi_slopes(heads) / torch.tensor([[1.0], [2.5]]) if biased else None
    begun = document_starts(documents(seq)) if masked else None
    return tensors, (1 / math.sqrt(head_dim), *(x if x is None else x.to(device) for x in (slopes, begun)))


def masked_scores(seq, slopes, begun, device):
    """Return the bias [rows or 1, heads or 1, queries, keys]; minus infinity for keys that are not seen."""
    place = torch.arange(seq, device=device)
    bias = torch.zeros(1, 1, seq, seq, dtype=torch.float64, device=device)
    if slopes is not None:
        bias = bias - slopes.double().view(-1, slopes.shape[-1], 1, 1) * (place[:, None] - place)
    unseen = (place > place[:, None])[None, None]
    if begun is not None:
        unseen = unseen | (place < begun[..., None])[:, None]
    return bias.masked_fill(unseen, -math.inf)


def of_torch(tensors, settings, dtype):
    """Return result and gradients of plain torch: products in that dtype, bias and softmax in fp32 (fp64 for fp64)."""
    scale, slopes, begun = settings
    *inputs, out_gradient = (x.detach().to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    group = inputs[0].shape[2] // inputs[1].shape[2]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    wide = torch.promote_types(dtype, torch.float32)
    mask = masked_scores(q.shape[2], slopes, begun, q.device).to(wide)
    weights = (scale * (q @ k.mT).to(wide) + mask).softmax(-1).to(dtype)
    result = (weights @ v).transpose(1, 2)
    return result.detach(), *torch.autograd.grad(result, inputs, out_gradient)


def of_kernels(tensors, settings, tile, *, heads_in_l2=2, HEADS_PER_PROGRAM=1):
    *inputs, out_gradient = tensors
    of_queries = sizes(tile) | {"heads_in_l2": heads_in_l2}
    out, lse = kernels.forward(*inputs, *settings, tile_config=of_queries)
    of_keys = of_queries | {"HEADS_PER_PROGRAM": HEADS_PER_PROGRAM}
    return out, *kernels.backward(
        out_gradient, *inputs, out, lse, *settings, query_tile_config=of_queries, key_tile_config=of_keys
    )


def close(found, true):
    """Allow sixteen roundings of the largest number: 2^-24 each, or 2^-21 with a GPU's three tf32 products."""
    limit = 16 * (2**-21 if found[0].is_cuda else 2**-24) * max(float(exact.abs().max()) for exact in true)
    for mine, exact in zip(found, true, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=limit)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_result_and_gradients_are_the_definition(tile, generator, device):
    tensors, settings = example((33, 2, 1, 20), generator, device, biased=True, masked=True)
    close(of_kernels(tensors, settings, tile), of_torch(tensors, settings, torch.float64))


@pytest.mark.parametrize(
    ("shape", "biased", "masked"),
    [
        ((33, 1, 1, 80), True, False),
        ((17, 4, 1, 160), False, True),
        ((32, 1, 1, 64), False, True),
        ((32, 2, 2, 16), False, False),
    ],
    ids=["btlm", "12b", "1.6b", "neither"],
)
def test_heads_of_the_shipped_models(shape, biased, masked, generator, device):
    tensors, settings = example(shape, generator, device, biased=biased, masked=masked)
    close(of_kernels(tensors, settings, (16, 16)), of_torch(tensors, settings, torch.float64))


def test_a_key_heads_gradients_are_sums_over_however_many_programs(generator, device):
    (query, key, value, dy), settings = example((18, 8, 2, 20), generator, device, biased=True, masked=True)
    _, _, *exact = of_torch((query, key, value, dy), settings, torch.float64)
    tile = sizes((16, 16))
    out, lse = kernels.forward(query, key, value, *settings, tile_config=tile)
    _, delta = kernels.backward_query(dy, query, key, value, out, lse, *settings, tile_config=tile)
    for num_heads in (1, 2, 4):
        given, shared = (dy, query, key, value, lse, delta, *settings), tile | {"HEADS_PER_PROGRAM": num_heads}
        close(kernels.backward_key_value(*given, tile_config=shared), exact)


def test_parts_are_added_from_the_first_head_on(generator, device):
    """Compute each query head with its own copy of the key head, then add head after head: the roundings are the same."""
    (query, key, value, dy), settings = example((18, 3, 1, 20), generator, device, biased=False, masked=True)
    apart = key.expand_as(query).contiguous(), value.expand_as(query).contiguous()
    alone = of_kernels([query, *apart, dy], settings, (16, 16))[2:]
    expected = [x[:, :, 0] + x[:, :, 1] + x[:, :, 2] for x in alone]
    found = [x[:, :, 0] for x in of_kernels([query, key, value, dy], settings, (16, 16), HEADS_PER_PROGRAM=1)[2:]]
    if device.type == "cpu":
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    else:  # two compilations may fuse different products with their sums
        close(found, [x.double() for x in expected])


def test_the_order_of_programs_changes_no_bit(generator, device):
    tensors, settings = example((17, 3, 1, 16), generator, device, biased=True, masked=True)
    first, *others = (of_kernels(tensors, settings, (16, 16), heads_in_l2=count) for count in (1, 2, 3, 99))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_heads_that_take_turns_divide_all_of_them():
    assert kernels._grid(64, 5, 10, {}) == (8, 5, 8)
    assert kernels._grid(64, 5, 10, {"heads_in_l2": 4}) == (4, 5, 16)
    assert kernels._grid(7, 5, 6, {}) == (1, 5, 7)
    assert kernels._grid(4, 5, 6, {}) == (4, 5, 1)
    assert kernels._grid(0, 5, 6, {}) == (1, 5, 0)


def test_one_token_and_tiles_wider_than_the_row(generator, device):
    for seq in (1, 5):
        tensors, settings = example((seq, 1, 1, 16), generator, device, biased=True, masked=True)
        close(of_kernels(tensors, settings, (16, 32)), of_torch(tensors, settings, torch.float64))


def test_sums_of_exponentials_are_natural_logarithms(generator, device):
    (query, key, value, _), settings = example((20, 1, 1, 16), generator, device, biased=True, masked=True)
    _, lse = kernels.forward(query, key, value, *settings, tile_config=sizes((16, 16)))
    scores = torch.einsum("rihd,rjd->rhij", query.double(), key[:, :, 0].double()) * settings[0]
    exact = (scores + masked_scores(20, *settings[1:], query.device)).logsumexp(-1)
    close([lse], [exact])


def test_parts_of_one_buffer_are_read_where_they_lie(generator, device):
    """[seq, rows, heads * 3 * head_dim], as a projection makes it. If head dims are not contiguous, they are copied first."""
    buffer = torch.randn(20, 2, 3 * 20, generator=generator).to(device)
    query, key, value = buffer.unflatten(-1, (1, 3, 20)).transpose(0, 1).unbind(3)
    apart = torch.randn(2, 20, 1, 20, generator=generator).to(device).transpose(1, 3)
    _, settings = example((20, 1, 1, 20), generator, device, biased=True, masked=True)
    for tensors in ([query, key, value, apart], [apart, key, value, query]):
        packed = [x.contiguous() for x in tensors]
        pairs = zip(*(of_kernels(x, settings, (16, 16)) for x in (tensors, packed)), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)


def test_far_tokens_are_as_far_as_the_definition_says(device):
    """Two keys with equal scores at distances 299 and 300: their weights differ by a factor of e^slope."""
    seq, slope = 301, 0.840896
    query = torch.ones(1, seq, 1, 16, device=device)
    key, value = torch.zeros_like(query), torch.zeros_like(query)
    key[:, :2], value[:, 1] = 1_024, 1
    slopes = torch.tensor([slope], device=device)
    out, _ = kernels.forward(query, key, value, 1.0, slopes, None, tile_config=sizes((64, 64)))
    # Scores near 16,384 are rounded to 2^-10 each.
    assert out[0, -1, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-slope)), abs=2**-10)


def test_nothing_reaches_a_token_from_its_future_or_from_other_documents(generator, device):
    """Change everything around the third document of the first row, then everything after its first ten tokens."""
    tensors, settings = example((33, 1, 1, 16), generator, device, biased=True, masked=True)
    before = of_kernels(tensors, settings, (16, 16))
    for x in tensors:
        x[0, :17] += 1
        x[0, 31:] += 1
    assert all(
        torch.equal(a[0, 17:31], b[0, 17:31])
        for a, b in zip(of_kernels(tensors, settings, (16, 16)), before, strict=True)
    )
    for x in tensors[:3]:
        x[0, 27:] += 1
    assert torch.equal(of_kernels(tensors, settings, (16, 16))[0][0, 17:27], before[0][0, 17:27])


def test_inputs_are_unchanged_and_the_bits_repeat(generator, device):
    tensors, settings = example((20, 2, 1, 20), generator, device, biased=True, masked=True, dtype=torch.bfloat16)
    before = [x.clone() for x in tensors]
    first, second = (of_kernels(tensors, settings, (16, 16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_bf16_errors_are_at_most_a_tenth_above_those_of_torch(generator, device):
    tensors, settings = example((33, 2, 1, 80), generator, device, biased=True, masked=True, dtype=torch.bfloat16)
    at_most_a_tenth_above(of_kernels(tensors, settings, (16, 16)), tensors, settings)


def at_most_a_tenth_above(found, tensors, settings):
    """Compare the norm of our error against fp64 with that of torch with bf16 products and a bias in fp32.

    SDPA wants a mask in its inputs' dtype. A bias rounded to bf16 would be torch's largest error, so the limit would be lax.
    """
    torch_bf16, exact = of_torch(tensors, settings, torch.bfloat16), of_torch(tensors, settings, torch.float64)
    for mine, theirs, true in zip(found, torch_bf16, exact, strict=True):
        assert 0 < (mine.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(257, "bfloat16"), (8, "float32"), (48, "float32"), (80, "float32"), (160, "float32")]
)
def test_heads_that_the_kernel_has_no_registers_for_are_written_out(head_dim, dtype, generator, device, monkeypatch):
    monkeypatch.setattr(kernels, "launch", None)
    (query, key, value, dy), settings = example(
        (3, 1, 1, head_dim), generator, device, biased=False, masked=True, dtype=getattr(torch, dtype)
    )
    beside, meant = (_attention._backend_fns[name](query, key, value, *settings) for name in ("cuda", "cpu"))
    known = dy, query, key, value, *meant, *settings
    beside += _attention_backward._backend_fns["cuda"](*known)
    meant += _attention_backward._backend_fns["cpu"](*known)
    assert all(torch.equal(one, other) for one, other in zip(beside, meant, strict=True))


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, "float32"), (32, "float32"), (64, "float32"), (80, "bfloat16"), (160, "bfloat16")]
)
def test_other_heads_are_the_kernels(head_dim, dtype, generator, device, monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *rest, **constants: launched.append(kernel.fn.__name__))
    (query, key, value, dy), settings = example(
        (3, 1, 1, head_dim), generator, device, biased=False, masked=True, dtype=getattr(torch, dtype)
    )
    out, lse = _attention._backend_fns["cuda"](query, key, value, *settings)
    _attention_backward._backend_fns["cuda"](dy, query, key, value, out, lse, *settings)
    assert launched == ["_forward", "_backward_queries", "_backward_keys"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "biased", "masked"),
    [
        ((8_192, 32, 32, 80), True, False),
        ((4_096, 32, 8, 160), False, True),
        ((4_096, 32, 8, 160), True, True),
        ((4_096, 32, 32, 64), False, True),
    ],
    ids=["btlm", "12b", "12b with biases", "1.6b"],
)
def test_gpu_errors_are_at_most_a_tenth_above_those_of_torch(shape, biased, masked, generator):
    """Run all heads in the kernels. Compare three groups: the steepest, a middle and the flattest bias."""
    seq, heads, num_kv_heads, head_dim = shape
    *tensors, out_gradient = [
        torch.randn(1, seq, count, head_dim, generator=generator).to("cuda", torch.bfloat16)
        for count in (heads, num_kv_heads, num_kv_heads, heads)
    ]
    scale, slopes = 1 / math.sqrt(head_dim), alibi_slopes(heads).cuda() if biased else None
    begun = document_starts((torch.rand(1, seq, generator=generator) < 0.002).cumsum(1)).cuda() if masked else None
    inputs = [x.requires_grad_() for x in tensors]
    found = attention(*inputs, scale=scale, slopes=slopes, document_starts=begun)
    found = found.detach(), *torch.autograd.grad(found, inputs, out_gradient)
    for kv_head in (0, num_kv_heads // 2, num_kv_heads - 1):
        of_query, of_key = (slice(kv_head * n, (kv_head + 1) * n) for n in (heads // num_kv_heads, 1))
        places = of_query, of_key, of_key, of_query
        alone = [x[:, :, place] for x, place in zip((*tensors, out_gradient), places, strict=True)]
        ours = [x[:, :, place] for x, place in zip(found, (of_query, *places[:3]), strict=True)]
        settings = scale, None if slopes is None else slopes[of_query], begun
        at_most_a_tenth_above(ours, alone, settings)
