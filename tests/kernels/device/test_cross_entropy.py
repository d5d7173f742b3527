"""The cross-entropy kernels against their meaning in fp64."""

import pytest
import torch

from tandem.kernels.cross_entropy import LOWEST, initial_statistics
from tandem.kernels.device import cross_entropy as kernels

SHAPES = [(1, 1, 1), (3, 8, 8), (5, 130, 97), (2, 256, 256), (3, 77, 1), (2, 5_000, 4_999), (2, 4_112, 4_096)]
"""Tokens, columns, columns without padding. Some rows have several blocks, and one has a last block of only padding."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SCALE = 0.7
ROUNDING = {torch.float32: 2**-18, torch.bfloat16: 0.51 * 2**-7}
"""Of a gradient, relative. z is ten at most, so rounded to 2^-21, its difference from the maximum to 2^-20, and that in powers
of two to 2^-20: errors of their exponential, and an eighth of that for the products. In bf16 half a unit in the last place.
"""


def example(tokens, width, columns, dtype, generator, device):
    """Padding that would change results, and targets at both ends and outside."""
    logits = 3 * torch.randn(tokens, width, generator=generator)
    logits[:, columns:] = float("nan")
    targets = torch.tensor([columns - 1, 0, columns, -2, columns // 2])[:tokens]
    gradients = torch.randn(2, tokens, generator=generator)
    return logits.to(device, dtype), targets.to(device), gradients.to(device)


def exact(logits, targets, gradients, columns, first=0):
    """Return log_sum_exp, the target's logit, and the gradient of the valid columns in fp64, by autograd of the definition."""
    true = logits[:, :columns].detach().cpu().double().requires_grad_()
    column = targets.cpu() - first
    here = (column >= 0) & (column < columns)
    z = SCALE * true
    pair = z.logsumexp(1), torch.where(here, z.gather(1, (column * here)[:, None])[:, 0], 0.0)
    (gradient,) = torch.autograd.grad(pair, true, list(gradients.cpu().double()))
    return [x.detach() for x in pair], gradient


def statistics_of(logits, targets, columns, first=0):
    statistics = initial_statistics(logits, targets)
    kernels.add_block(logits, targets, statistics, first=first, columns=columns, scale=SCALE)
    return statistics


def pair_of(statistics):
    maximum, total, target_logit = statistics
    return maximum + total.log(), target_logit


def of_token(statistics, gradients):
    """Return the arguments of the gradient kernel, given the gradients of log_sum_exp and of the target's logit."""
    return statistics[0], gradients[0] / statistics[1], gradients[1]


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "columns"), SHAPES)
def test_results_and_gradient_are_the_meaning(tokens, width, columns, dtype, generator, device):
    logits, targets, gradients = example(tokens, width, columns, dtype, generator, device)
    targets += 1_000  # ids of a block that begins there
    expected, gradient = exact(logits, targets, gradients, columns, first=1_000)
    before, statistics = logits.clone(), statistics_of(logits, targets, columns, first=1_000)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    for found, true in zip(pair_of(statistics), expected, strict=True):
        # A few roundings of numbers of the size of the result.
        torch.testing.assert_close(found.cpu().double(), true, rtol=4 * 2**-24, atol=2**-22)
    given = of_token(statistics, gradients)
    kernels.write_block_gradient(logits, targets, *given, first=1_000, columns=columns, scale=SCALE)
    torch.testing.assert_close(logits[:, :columns].cpu().double(), gradient, rtol=ROUNDING[dtype], atol=0)
    assert not logits[:, columns:].any()


@DTYPES
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_apart_and_unaligned_are_read_and_written_where_they_lie(offset, dtype, generator, device):
    buffer, targets, gradients = example(4, 150, 150, dtype, generator, device)
    inside = buffer[:, offset : offset + 100]
    packed, around = inside.clone(), buffer.clone()
    statistics = statistics_of(inside, targets, 93)
    assert torch.equal(statistics, statistics_of(packed, targets, 93))
    for given in (inside, packed):
        kernels.write_block_gradient(given, targets, *of_token(statistics, gradients), first=0, columns=93, scale=SCALE)
    assert torch.equal(inside, packed)
    around[:, offset : offset + 100] = packed
    assert torch.equal(buffer, around)


def test_blocks_one_after_the_other_are_the_whole(generator, device):
    logits, targets, gradients = example(5, 300, 260, torch.bfloat16, generator, device)
    targets[4] = 200  # in the second block
    expected, gradient = exact(logits, targets, gradients, 260)
    blocks = [(first, min(260 - first, 128)) for first in (0, 128, 256)]
    statistics = initial_statistics(logits, targets)
    for first, true in blocks:
        part = logits[:, first : first + 128]
        kernels.add_block(part, targets, statistics, first=first, columns=true, scale=SCALE)
    for found, true in zip(pair_of(statistics), expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), true, rtol=8 * 2**-24, atol=2**-22)
    for first, true in blocks:
        part = logits[:, first : first + 128]
        kernels.write_block_gradient(
            part, targets, *of_token(statistics, gradients), first=first, columns=true, scale=SCALE
        )
    torch.testing.assert_close(logits[:, :260].cpu().double(), gradient, rtol=ROUNDING[torch.bfloat16], atol=0)
    assert not logits[:, 260:].any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_a_block_without_true_columns_adds_nothing_and_has_no_gradient(generator, device):
    logits, targets, gradients = example(4, 40, 0, torch.bfloat16, generator, device)
    statistics = statistics_of(logits, targets, 0)
    assert statistics.tolist() == [[torch.tensor(LOWEST).item()] * 4, [0.0] * 4, [0.0] * 4]
    kernels.write_block_gradient(logits, targets, statistics[0], *gradients, first=0, columns=0, scale=SCALE)
    assert logits.tolist() == [[0.0] * 40] * 4


def test_large_logits_neither_overflow_nor_vanish_wrongly(device):
    logits = torch.tensor([[-3e4, 2e4, 2e4, -1.0], [-500.0, -501.0, -600.0, -3e4]], device=device)
    targets, gradients = torch.tensor([1, 0], device=device), torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=device)
    expected, gradient = exact(logits, targets, gradients, 4)
    statistics = statistics_of(logits, targets, 4)
    log_sum_exp, _ = pair_of(statistics)
    torch.testing.assert_close(log_sum_exp.cpu().double(), expected[0], rtol=2**-22, atol=0)
    kernels.write_block_gradient(logits, targets, *of_token(statistics, gradients), first=0, columns=4, scale=SCALE)
    # z is 14,000, rounded by half of 2**-10, which becomes a relative error of its exponential; the maximum's doubles it.
    close = {"rtol": 2**-10, "atol": torch.finfo(torch.float32).tiny}
    torch.testing.assert_close(logits.cpu().double(), gradient, **close)


def test_what_is_no_number_stays_none(generator, device):
    """Training detects it in the loss."""
    logits, targets, _ = example(3, 40, 40, torch.bfloat16, generator, device)
    logits[1, 17] = float("nan")
    _, total, _ = statistics_of(logits, targets, 40)
    assert total.isnan().tolist() == [False, True, False]


def test_the_bits_repeat_and_what_is_only_read_is_unchanged(generator, device):
    logits, targets, gradients = example(5, 300, 260, torch.bfloat16, generator, device)
    first, second = (statistics_of(logits, targets, 260) for _ in range(2))
    assert torch.equal(first, second)
    read = [targets, *of_token(first, gradients)]
    before, twice = [x.clone() for x in read], [logits.clone(), logits.clone()]
    for given in twice:
        kernels.write_block_gradient(given, *read, first=0, columns=260, scale=SCALE)
    assert torch.equal(*twice)
    assert all(torch.equal(a, b) for a, b in zip(read, before, strict=True))
