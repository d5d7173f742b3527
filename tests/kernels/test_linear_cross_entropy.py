"""The chunked projection and cross-entropy against an unchunked one."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tandem.kernels.linear_cross_entropy import (
    chunked_gradients,
    chunked_statistics,
    columns_per_chunk,
    linear_cross_entropy,
)

SHAPES = [(1, 1, 1, 1), (5, 6, 300, 271), (4, 3, 300, 100), (3, 4, 256, 0), (3, 5, 130, 130)]
"""Tokens, width, padded vocabulary, vocabulary. Their chunks have 128 columns."""
SCALE = 0.7
PRODUCTION = [(8192, 2560, 50_304, 50_257, 0.5), (4096, 5120, 100_352, 100_352, 1.0)]
"""BTLM and Stable LM 2 12B: tokens, width, padded vocabulary, vocabulary, scale."""


def example(tokens, width, vocab, columns, generator, dtype=torch.float64):
    """Targets at both ends, in every chunk and outside; rows of padding that would change results."""
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = 2 * torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5
    weight[columns:] = 9.0
    targets = torch.tensor([columns - 1, 130, 0, columns, -5])[:tokens].clamp(max=vocab - 1)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def definition(hidden, weight, targets, columns, scale=SCALE):
    """Both results from all logits at once. Logits have the dtype of the factors, the rest is fp32 (fp64 for fp64)."""
    logits = linear(hidden, weight[:columns])
    z = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    here = (targets >= 0) & (targets < columns)
    padded = torch.nn.functional.pad(z, (0, 1))  # a column for targets outside
    return z.logsumexp(1), torch.where(here, padded.gather(1, (targets * here)[:, None])[:, 0], 0.0)


def found_in(hidden, weight, targets, columns, scale=SCALE):
    """Return log_sum_exp and the target's logit, computed by the operation."""
    maximum, total, target_logit = linear_cross_entropy(hidden, weight, targets, num_valid_columns=columns, scale=scale)
    return maximum + total.log(), target_logit


def gradients(pair, leaves, weights):
    return torch.autograd.grad(pair, leaves, [weight.to(x.dtype) for weight, x in zip(weights, pair, strict=True)])


@pytest.mark.parametrize(("tokens", "width", "vocab", "columns"), SHAPES)
def test_forward_and_backward_are_the_definition_in_double(tokens, width, vocab, columns, generator):
    *leaves, targets = example(tokens, width, vocab, columns, generator)
    weights = torch.randn(2, tokens, generator=generator)
    found, true = found_in(*leaves, targets, columns), definition(*leaves, targets, columns)
    torch.testing.assert_close(found, true)
    ours = gradients(found, leaves, weights)
    if columns:
        torch.testing.assert_close(ours, gradients(true, leaves, weights))
    assert not ours[1][columns:].any()


def test_gradients_are_the_differences_quotients(generator):
    *leaves, targets = example(2, 2, 130, 129, generator)
    assert torch.autograd.gradcheck(lambda *leaves: found_in(*leaves, targets, 129), leaves)


def test_bf16_error_is_at_most_a_tenth_above_that_of_plain_torch_in_bf16(generator):
    """The difference from fp64 on the same factors. Logits are rounded like ours, so only the order of sums may differ."""
    hidden, weight, _ = example(96, 64, 1000, 977, generator, torch.bfloat16)
    targets = torch.randint(977, (96,), generator=generator)
    assert_at_most_a_tenth_above_plain_torchs_error(hidden, weight, targets, 977, SCALE)


def assert_at_most_a_tenth_above_plain_torchs_error(hidden, weight, targets, columns, scale):
    leaves, weights = (hidden, weight), torch.stack((torch.ones(len(targets)), -torch.ones(len(targets)))).to(hidden)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def evaluated(pair, leaves):
        return [pair[0].detach() - pair[1].detach(), *gradients(pair, leaves, weights)]

    exact = evaluated(definition(*doubles, targets, columns, scale), doubles)
    ours = evaluated(found_in(*leaves, targets, columns, scale), leaves)
    torchs = evaluated(definition(*leaves, targets, columns, scale), leaves)
    for true, mine, plain in zip(exact, ours, torchs, strict=True):
        assert 0 < (mine - true).norm() <= 1.1 * (plain - true).norm()


class Allocated(TorchDispatchMode):
    """Record the peak bytes of tensors made within the block, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak, self.products = {}, 0, []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        self.storages = {key: box for key, box in self.storages.items() if not box.expired()}
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((arguments, keywords)) if torch.is_tensor(tensor)
        }
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and (key := tensor.untyped_storage()._cdata) not in given:
                self.storages.setdefault(key, Held(tensor.untyped_storage()))
        self.peak = max(self.peak, sum(box.num_bytes for box in self.storages.values()))
        return result


class Held:
    """Refers to a storage without keeping it alive."""

    def __init__(self, storage):
        self.reference, self.num_bytes = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()

    def expired(self):
        return self.reference.expired()


def test_no_more_than_a_tenth_of_the_logits_is_held_beside_the_results(generator):
    """Counts the loop over chunks. Operations on one chunk allocate nothing if they are kernels."""
    tokens, width, vocab = 64, 8, 4096
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    logits_bytes = 4 * tokens * vocab
    with Allocated() as forward:
        statistics = chunked_statistics(hidden, weight, targets, vocab, SCALE)
    assert logits_bytes / 20 < forward.peak - statistics.nbytes < logits_bytes / 10
    with Allocated() as backward:
        results = chunked_gradients(hidden, weight, targets, statistics, torch.ones(3, tokens), vocab, SCALE)
    # In fp32 the sum is already the gradient of hidden, without a rounded copy.
    assert logits_bytes / 20 < backward.peak - sum(x.nbytes for x in results) < logits_bytes / 10


@pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="torch 2.11: on meta addmm takes out_dtype for a factor"
)
@pytest.mark.parametrize(("width", "vocab"), [(2_560, 50_304), (5_120, 100_352)], ids=["btlm", "stablelm"])
def test_bf16_backward_holds_less_than_a_tenth_of_the_fp32_logits_beside_its_results(width, vocab):
    """At real sizes on the meta device: a chunk, the fp32 sum of hidden's gradient, and the statistics."""
    tokens = 4_096
    with torch.device("meta"):
        hidden, weight = (torch.empty(size, width, dtype=torch.bfloat16) for size in (tokens, vocab))
        targets, statistics = torch.empty(tokens, dtype=torch.long), torch.empty(3, tokens)
    with Allocated() as held:
        total, weight_gradient = chunked_gradients(hidden, weight, targets, statistics, statistics, vocab, SCALE)
        hidden_gradient = total.to(hidden.dtype)
    assert held.peak - weight_gradient.nbytes - hidden_gradient.nbytes < 4 * tokens * vocab / 10


@pytest.mark.parametrize("local", [50_304, 25_216, 12_672, 100_352, 50_176, 25_088, 4_096, 3_840])
def test_a_chunk_is_whole_blocks_and_less_than_a_tenth(local):
    assert columns_per_chunk(local) % 128 == 0
    assert columns_per_chunk(local) < local / 10


def test_the_factors_and_three_numbers_per_token_are_kept(generator):
    hidden, weight, targets = example(5, 6, 300, 271, generator, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        maximum, _, _ = linear_cross_entropy(hidden, weight, targets, num_valid_columns=271, scale=SCALE)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (hidden, weight, targets, maximum)]
    assert kept[-1].shape == (3, 5)


def test_inputs_are_unchanged_backward_repeats_and_so_do_the_bits(generator):
    *leaves, targets = example(5, 6, 300, 271, generator, torch.bfloat16)
    before, weights = [leaf.detach().clone() for leaf in leaves], torch.randn(2, 5, generator=generator)
    first, second = (found_in(*leaves, targets, 271) for _ in range(2))
    with torch.no_grad():
        without = found_in(*leaves, targets, 271)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, without, strict=True))
    again = gradients(first, leaves, weights), gradients(second, leaves, weights)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def on_gpu(tokens, width, vocab, columns, dtype=torch.bfloat16):
    torch.manual_seed(1)
    hidden = torch.randn(tokens, width, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(columns, (tokens,), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width", "vocab", "columns", "scale"), PRODUCTION)
def test_bf16_error_is_at_most_a_tenth_above_that_of_plain_torch_at_production_shapes(
    tokens, width, vocab, columns, scale
):
    hidden, weight, targets = on_gpu(
        tokens // 4, width, vocab, columns
    )  # a quarter: fp64 logits and gradients must fit
    assert_at_most_a_tenth_above_plain_torchs_error(hidden, weight, targets, columns, scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width", "vocab", "columns", "scale"), PRODUCTION)
def test_memory_stays_below_a_tenth_of_the_fp32_logits_on_a_gpu(tokens, width, vocab, columns, scale):
    """Memory beyond inputs and gradients. Forward has no sum and stays below a tenth of the bf16 logits."""
    found_in(*on_gpu(128, 64, 128, 128), 128)[0].sum().backward()  # warm-up: cuBLAS keeps a workspace for each thread
    hidden, weight, targets = on_gpu(tokens, width, vocab, columns)
    logits_bytes = 2 * tokens * vocab
    before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
    log_sum_exp, target_logit = found_in(hidden, weight, targets, columns, scale)
    assert torch.cuda.max_memory_allocated() - before < logits_bytes / 10
    before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
    (log_sum_exp - target_logit).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes + hidden.nbytes + 2 * logits_bytes / 10
