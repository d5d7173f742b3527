"""Cross-entropy is torch's over the true vocabulary, whatever stands in the padded columns."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import cross_entropy as torchs

from trainer.parallel.loss import cross_entropy, without_padding
from trainer.parallel.mesh import Mesh, started

SEQ, ROWS, VOCAB, PADDED = 5, 3, 101, 128


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with started(1) as mesh:
        yield mesh


def example(padded: int = PADDED) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with large numbers in the padded columns, and targets up to the last true id."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(SEQ, ROWS, padded, generator=generator)
    logits[..., VOCAB:] = 50.0
    targets = torch.randint(VOCAB, (SEQ, ROWS), generator=generator)
    targets[0, 0], targets[0, 1] = 0, VOCAB - 1
    return logits, targets


def exact(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of their sum, from the true columns in fp64."""
    true = logits[..., :VOCAB].double().detach().requires_grad_()
    losses = torchs(true.flatten(0, 1), targets.flatten(), reduction="none").view(SEQ, ROWS)
    losses.sum().backward()
    return losses.detach(), true.grad


def test_losses_and_gradients_are_torchs(mesh):
    logits, targets = example()
    logits.requires_grad_()
    losses = cross_entropy(logits, targets, vocab=VOCAB, mesh=mesh)
    losses.sum().backward()
    expected, gradient = exact(logits, targets)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad[..., :VOCAB].double(), gradient, rtol=1e-5, atol=1e-7)
    assert not logits.grad[..., VOCAB:].any()


def test_bf16_logits_lose_nothing_more(mesh):
    """The arithmetic is fp32's: the loss is that of the rounded logits."""
    logits, targets = example()
    losses = cross_entropy(logits.bfloat16(), targets, vocab=VOCAB, mesh=mesh)
    assert losses.dtype == torch.float32
    expected, _ = exact(logits.bfloat16().float(), targets)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_callers_logits_are_left_alone(mesh):
    """megatron-core's function works in place."""
    logits, targets = example()
    before = logits.clone()
    cross_entropy(logits, targets, vocab=VOCAB, mesh=mesh)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [128, 200, 101, 129, 256])
def test_only_ids_beyond_the_vocabulary_are_excluded_on_any_rank(mesh, vocab):
    masked = []
    for tp_rank in (0, 1):
        place = Mesh(**vars(mesh) | {"tp_rank": tp_rank, "tp_size": 2})
        masked.append(without_padding(torch.zeros(1, 128), vocab=vocab, mesh=place))
    kept = torch.cat(masked, dim=-1)[0] == 0
    assert kept.tolist() == [True] * vocab + [False] * (256 - vocab)
