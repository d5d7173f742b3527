"""The references against facts that need no other model: a document alone is a document among others."""

import pytest
import torch

from tests.reference.stablelm import positions
from tests.reference.variants import VARIANTS, random_tokens, reference_module, to_fp64


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_document_reads_as_if_it_were_alone(variant: str) -> None:
    """In fp64, where restarted and shifted positions differ by rounding only."""
    model, mup = VARIANTS[variant]
    read, batch = (
        to_fp64(reference_module(model).random_tensors(model, seed=5)).__getitem__,
        random_tokens(model, seq_len=20),
    )
    documents = torch.tensor([[0] * 6 + [1] * 9 + [2] * 5, [0] * 1 + [1] * 19])
    together = reference_module(model).logits(read, model, mup, batch, documents)
    for row, start, end in ((0, 0, 6), (0, 6, 15), (0, 15, 20), (1, 0, 1), (1, 1, 20)):
        alone = reference_module(model).logits(read, model, mup, batch[row : row + 1, start:end])[0]
        assert (together[row, start:end] - alone).abs().max() < 1e-12
    assert (together - reference_module(model).logits(read, model, mup, batch)).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant: str) -> None:
    model, mup = VARIANTS[variant]
    read, batch = (
        to_fp64(reference_module(model).random_tensors(model, seed=5)).__getitem__,
        random_tokens(model, seq_len=20),
    )
    changed = batch.clone()
    changed[:, 12] = (changed[:, 12] + 1) % model.vocab_size
    before, after = (reference_module(model).logits(read, model, mup, each) for each in (batch, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_has_a_part_in_the_loss(variant: str) -> None:
    """A tensor that nothing reads would be compared in vain."""
    model, mup = VARIANTS[variant]
    leaves = to_fp64(reference_module(model).random_tensors(model, seed=5))
    for leaf in leaves.values():
        leaf.requires_grad_()
    reference_module(model).logits(leaves.__getitem__, model, mup, random_tokens(model)).logsumexp(-1).mean().backward()
    assert all(leaf.grad.abs().max() > 1e-6 for leaf in leaves.values())


def test_positions_restart_with_the_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    assert positions(documents, documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3]]
    assert positions(documents, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
