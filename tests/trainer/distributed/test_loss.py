"""Cross-entropy equals its definition in fp64 over the unpadded vocabulary, for every position of the padding.

Hidden and weight are multiples of 1/16 below 8. bf16 represents them exactly, and fp32 the sum of eight products. The only
error of the logits is therefore their own rounding to bf16, and the tests measure only what follows.
"""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tandem.trainer.distributed.layers import copy_to_tp
from tandem.trainer.distributed.loss import parallel_cross_entropy
from tandem.trainer.distributed.mesh import mesh_context
from tests import ranks

SEQ, ROWS, WIDTH, LOCAL, SCALE = 5, 3, 8, 128, 0.7
ON_ONE = [101, 128]
ON_TWO = [101, 128, 129, 200, 256]
"""Unpadded vocabularies. Of its 128 rows, the second rank has none, none, one, some and all."""
DTYPES = [torch.float32, torch.bfloat16]
Found = dict[tuple[int, torch.dtype], dict[str, Tensor]]
"""(Vocabulary, dtype) -> losses and gradients."""


def example(vocab: int, tp_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs with padding that would change the result, and targets at both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    hidden = sixteenths(torch.randn(SEQ, ROWS, WIDTH, generator=generator))
    weight = sixteenths(2 * torch.randn(tp_size * LOCAL, WIDTH, generator=generator))
    weight[vocab:] = 7.0
    targets = torch.randint(vocab, (ROWS, SEQ), generator=generator).t()
    targets[0, 0], targets[0, 1] = 0, vocab - 1
    return hidden, weight, targets


def sixteenths(x: Tensor) -> Tensor:
    return (16 * x).round().clamp(-127, 127) / 16


def of_each() -> Tensor:
    """Return a different weight for each loss, so that swapped losses are detected."""
    return torch.linspace(0.5, 1.5, SEQ * ROWS).view(SEQ, ROWS)


def on_each(vocabs: list[int], tp_size: int) -> Found:
    """Compute losses and this rank's gradients."""
    found = {}
    with mesh_context(tp_size) as mesh:
        for vocab, dtype in product(vocabs, DTYPES):
            hidden, weight, targets = example(vocab, tp_size)
            hidden = hidden.to(dtype).requires_grad_()
            local = weight[mesh.tp_rank * LOCAL :][:LOCAL].to(dtype, copy=True).requires_grad_()
            losses = parallel_cross_entropy(
                copy_to_tp(hidden), local, targets, vocab_size=vocab, scale=SCALE, mesh=mesh
            )
            (losses * of_each()).sum().backward()
            found[vocab, dtype] = {"losses": losses.detach(), "hidden": hidden.grad, "weight": local.grad}
    return found


def assert_close(found: dict[str, Tensor], vocab: int, tp_size: int, dtype: torch.dtype) -> None:
    """Compare with fp64 on the same logits, rounded to the dtype.

    In fp32, three values are rounded: z, its distance from the maximum, and the sum. The error is at most three roundings of
    the largest z: absolute for a loss, relative for each term of a gradient, where they are in the exponent. In the dtype,
    three more are rounded: the gradient of a logit, its product with the other factor, and the sum over ranks.
    """
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in example(vocab, tp_size))
    hidden, weight, targets = hidden.flatten(0, 1), weight[:vocab], targets.flatten()
    z = SCALE * (hidden @ weight.t()).to(dtype).double()
    hit, of_loss = one_hot(targets, vocab), SCALE * of_each().double().view(-1, 1)
    losses = z.logsumexp(-1) - (z * hit).sum(-1)
    gradient, size = of_loss * (z.softmax(-1) - hit), of_loss * (z.softmax(-1) + hit)
    in_fp32 = 3 * float(z.abs().max()) * 2**-24
    in_all = in_fp32 + 3 * torch.finfo(dtype).eps / 2
    for name, true, limit in (
        ("losses", losses, in_fp32),
        ("hidden", gradient @ weight, in_all * size @ weight.abs()),
        ("weight", gradient.t() @ hidden, in_all * size.t() @ hidden.abs()),
    ):
        mine = found[name].double().flatten(0, found[name].ndim - true.ndim)[: len(true)]  # without padding
        assert ((mine - true).abs() <= limit).all(), name
    assert found["losses"].dtype == torch.float32
    assert not found["weight"][vocab:].any()


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> list[Found]:
    return ranks.run(on_each, 2, tmp_path_factory.mktemp("loss"), ON_TWO, 2)


def test_losses_and_gradients_are_the_definition_on_one_rank():
    for (vocab, dtype), found in on_each(ON_ONE, 1).items():
        assert_close(found, vocab, 1, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", ON_TWO)
def test_losses_and_gradients_are_the_definition_on_two(on_two, vocab, dtype):
    first, second = (rank[vocab, dtype] for rank in on_two)
    for name in ("losses", "hidden"):
        assert torch.equal(first[name], second[name])
    assert_close(first | {"weight": torch.cat((first["weight"], second["weight"]))}, vocab, 2, dtype)
