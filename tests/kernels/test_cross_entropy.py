"""Cross-entropy over given logits against its definition in fp64."""

import pytest
import torch

from tandem.kernels.cross_entropy import LOWEST, cross_entropy, initial_statistics

SHAPES = [(1, 1, 1), (5, 7, 7), (4, 40, 37), (3, 130, 1)]
"""Tokens, columns, columns without padding."""
SCALE = 0.7
OPS = torch.ops.tandem


def example(tokens, width, columns, generator, dtype=torch.float64):
    """Padding that would change results, and targets in the first and last valid column and outside both ends."""
    logits = 3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    logits[:, columns:] = 90.0
    targets = torch.tensor([columns - 1, 0, columns, -2, columns // 2])[:tokens]
    return logits.to(dtype), targets


def definition(logits, targets, columns, scale=SCALE):
    """Return log_sum_exp and the target's logit in fp64."""
    z = scale * logits.double()[:, :columns]
    here = (targets >= 0) & (targets < columns)
    return z.exp().sum(1).log(), torch.where(here, z.gather(1, (targets * here)[:, None])[:, 0], 0.0)


def found_in(logits, targets, columns, scale=SCALE):
    """Return log_sum_exp and the target's logit, computed by the operation."""
    maximum, total, target_logit = cross_entropy(logits, targets, num_valid_columns=columns, scale=scale)
    return maximum + total.log(), target_logit


def gradient(function, logits, generator):
    """Gradient of a sum of both results with a different weight for each number."""
    pair = function(logits)
    weights = [torch.randn(len(logits), generator=generator).to(x.dtype) for x in pair]
    return torch.autograd.grad(pair, logits, weights)[0]


@pytest.mark.parametrize(("tokens", "width", "columns"), SHAPES)
def test_forward_and_backward_are_the_definition_in_double(tokens, width, columns, generator):
    logits, targets = example(tokens, width, columns, generator)
    expected = definition(logits, targets, columns)
    leaf = logits.clone().requires_grad_()
    state = generator.get_state()
    true = gradient(lambda x: definition(x, targets, columns), leaf, generator)
    generator.set_state(state)
    found = gradient(lambda x: found_in(x * 1.0, targets, columns), leaf, generator)
    torch.testing.assert_close(found_in(logits, targets, columns), expected)
    torch.testing.assert_close(found, true)
    assert not found[:, columns:].any()


def test_bf16_logits_give_fp32_results_and_a_gradient_rounded_once(generator):
    logits, targets = example(5, 300, 277, generator, torch.bfloat16)
    pair = found_in(logits, targets, 277)
    for found, true in zip(pair, definition(logits, targets, 277), strict=True):
        assert found.dtype == torch.float32
        # The maximum, the logarithm and their sum are each rounded once; an error in the sum of 277 enters its logarithm.
        torch.testing.assert_close(found.double(), true, rtol=3 * 2**-24, atol=2**-22)
    leaf = logits.clone().requires_grad_()
    state = generator.get_state()
    true = gradient(lambda x: definition(x, targets, 277), leaf.double().detach().requires_grad_(), generator)
    generator.set_state(state)
    found = gradient(lambda x: found_in(x * 1.0, targets, 277), leaf, generator)
    # Half a unit in the last place, and a fiftieth of that for the fp32 arithmetic.
    torch.testing.assert_close(found.double(), true, rtol=0.51 * 2**-7, atol=0)


def test_backward_writes_the_gradient_over_the_logits(generator):
    logits, targets = example(4, 9, 8, generator)
    leaf = logits.requires_grad_()
    given = leaf * 1.0
    found = gradient(lambda x: found_in(x, targets, 8), given, generator)
    assert found.data_ptr() == given.data_ptr()


def test_a_second_backward_is_refused(generator):
    logits, targets = example(4, 9, 8, generator)
    log_sum_exp, target_logit = found_in(logits.requires_grad_() * 1.0, targets, 8)
    loss = (log_sum_exp - target_logit).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_reads_the_logits_in_backward_later_is_refused(generator):
    logits, targets = example(4, 9, 8, generator)
    given = logits.requires_grad_() * 1.0
    squares = (given * given).sum()  # created earlier, so its backward runs later
    log_sum_exp, target_logit = found_in(given, targets, 8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((log_sum_exp - target_logit).sum() + squares).backward()


def test_forward_changes_nothing_keeps_the_logits_and_repeats_its_bits(generator):
    logits, targets = example(5, 9, 8, generator, torch.bfloat16)
    logits, kept = logits.requires_grad_() * 1.0, []
    before = logits.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        first = cross_entropy(logits, targets, num_valid_columns=8, scale=SCALE)
    second = cross_entropy(logits, targets, num_valid_columns=8, scale=SCALE)
    assert torch.equal(logits, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (logits, targets, first[0])]


def test_blocks_one_after_the_other_are_the_whole(generator):
    logits, targets = example(5, 12, 9, generator)
    statistics = initial_statistics(logits, targets)
    for first in (8, 0, 4):  # the last block has one valid column
        true = min(9 - first, 4)
        OPS.cross_entropy_add(logits[:, first : first + 4], targets, statistics, first=first, columns=true, scale=SCALE)
    torch.testing.assert_close(tuple(statistics), cross_entropy(logits, targets, num_valid_columns=9, scale=SCALE))


def test_a_part_without_columns_has_no_total_and_no_gradient(generator):
    logits, targets = example(4, 6, 0, generator, torch.float32)
    logits.requires_grad_()
    maximum, total, target_logit = cross_entropy(logits * 1.0, targets, num_valid_columns=0, scale=SCALE)
    assert maximum.tolist() == [LOWEST] * 4
    assert total.tolist() == target_logit.tolist() == [0.0] * 4
    (total + target_logit).sum().backward()
    assert logits.grad.tolist() == [[0.0] * 6] * 4


def test_large_logits_neither_overflow_nor_vanish_wrongly():
    logits = torch.tensor([[-3e4, 2e4, 2e4, -1.0], [-500.0, -501.0, -600.0, -3e4]], requires_grad=True)
    targets = torch.tensor([1, 0])
    log_sum_exp, _ = found_in(logits * 1.0, targets, 4, scale=1.0)
    expected = torch.logsumexp(logits.double(), 1)
    torch.testing.assert_close(log_sum_exp.double(), expected, rtol=2**-23, atol=0)
    log_sum_exp.sum().backward()
    # A few roundings, whatever the size of the logits. The exponential of a rounded log_sum_exp would depend on it.
    close = {"rtol": 2**-21, "atol": torch.finfo(torch.float32).tiny}
    torch.testing.assert_close(logits.grad.double(), torch.softmax(logits.double(), 1), **close)


def test_a_leaf_with_a_gradient_is_refused(generator):
    """A leaf would hold its own gradient after backward. Without a backward it is accepted."""
    logits, targets = example(4, 9, 8, generator)
    with pytest.raises(ValueError, match="logits are a leaf"):
        cross_entropy(logits.requires_grad_(), targets, num_valid_columns=8, scale=SCALE)
    with torch.no_grad():
        cross_entropy(logits, targets, num_valid_columns=8, scale=SCALE)


def test_rows_may_lie_apart_but_columns_may_not(generator):
    buffer, targets = example(4, 20, 8, generator)
    inside = buffer[:, :9]
    whole = cross_entropy(inside.contiguous(), targets, num_valid_columns=8, scale=SCALE)
    torch.testing.assert_close(cross_entropy(inside, targets, num_valid_columns=8, scale=SCALE), whole)
    for refused in (buffer[:, :18:2], inside.t().contiguous().t(), inside[:1].expand(4, 9)):
        with pytest.raises(ValueError, match=r"logits of shape 4 x 9 have strides .*: make them contiguous"):
            cross_entropy(refused, targets, num_valid_columns=8, scale=SCALE)
