"""Cross-entropy is torch's over the true vocabulary, wherever its rows and the padded ones lie."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs

from tests import ranks
from trainer.parallel.layers import to_columns
from trainer.parallel.loss import cross_entropy
from trainer.parallel.mesh import started

SEQ, ROWS, WIDTH, LOCAL, SCALE = 5, 3, 8, 128, 0.7
ON_ONE = [101, 128]
ON_TWO = [101, 128, 129, 200, 256]
"""True vocabularies. The second rank has, of 128 rows, none, none, one, some, and all."""


def example(vocab: int, tp_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padding that would show, targets at both ends."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQ, ROWS, WIDTH, generator=generator)
    weight = 2 * torch.randn(tp_size * LOCAL, WIDTH, generator=generator)
    weight[vocab:] = 50.0
    targets = torch.randint(vocab, (ROWS, SEQ), generator=generator).t()
    targets[0, 0], targets[0, 1] = 0, vocab - 1
    return hidden, weight, targets


def weighted(losses: Tensor) -> Tensor:
    """With a different weight for each, so that no two may be exchanged."""
    return (losses * torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view(losses.shape)).sum()


def on_each(vocabs: list[int], tp_size: int) -> dict[int, dict[str, Any]]:
    """Losses, and this rank's gradients, for every vocabulary."""
    found = {}
    with started(tp_size) as mesh:
        for vocab in vocabs:
            hidden, weight, targets = example(vocab, tp_size)
            local = weight[mesh.tp_rank * LOCAL :][:LOCAL].clone().requires_grad_()
            hidden.requires_grad_()
            losses = cross_entropy(to_columns(hidden), local, targets, vocab=vocab, scale=SCALE, mesh=mesh)
            weighted(losses).backward()
            found[vocab] = {"losses": losses.detach(), "hidden": hidden.grad, "weight": local.grad}
    return found


def exact(vocab: int, tp_size: int) -> dict[str, Tensor]:
    """The same of the true rows, whole, in fp64."""
    hidden, weight, targets = example(vocab, tp_size)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    logits = SCALE * leaves[0] @ leaves[1][:vocab].t()
    losses = torchs(logits.flatten(0, 1), targets.flatten(), reduction="none").view(SEQ, ROWS)
    weighted(losses).backward()
    return {"losses": losses.detach(), "hidden": leaves[0].grad, "weight": leaves[1].grad}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, true in expected.items():
        # Logits of 20 at most, sums of 256: errors of fp32 on that scale.
        torch.testing.assert_close(found[name].double(), true, rtol=1e-5, atol=20 * 2**-22)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> list[dict[int, dict[str, Any]]]:
    return ranks.run(on_each, 2, tmp_path_factory.mktemp("loss"), ON_TWO, 2)


def test_losses_and_gradients_are_torchs_on_one_rank():
    for vocab, found in on_each(ON_ONE, 1).items():
        assert found["losses"].dtype == torch.float32
        assert_close(found, exact(vocab, 1))
        assert not found["weight"][vocab:].any()


@pytest.mark.dist
@pytest.mark.parametrize("vocab", ON_TWO)
def test_losses_and_gradients_are_torchs_on_two(on_two, vocab):
    first, second = (rank[vocab] for rank in on_two)
    for name in ("losses", "hidden"):
        assert torch.equal(first[name], second[name])
    together = first | {"weight": torch.cat((first["weight"], second["weight"]))}
    assert_close(together, exact(vocab, 2))
    assert not together["weight"][vocab:].any()
