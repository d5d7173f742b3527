"""Either model is the same with the kernels of a GPU as with what they mean: they are run here, in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

import tests.interpreter  # noqa: F401
from tests import tiny
from tests.reference.variants import reference
from trainer import models
from trainer.checkpoint.read import load_weights
from trainer.models.layers import Decoder
from trainer.parallel.mesh import Mesh, started

EVERYWHERE = {
    "attention",
    "attention_backward",
    "cross_entropy_add",
    "cross_entropy_gradient",
    "swiglu",
    "swiglu_backward",
}
STABLELM = {"split_rotated", "split_rotated_backward"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with started(1) as mesh:
        yield mesh


@pytest.fixture
def on_kernels(monkeypatch):
    """on_kernels(): from then on operations on the CPU take the way they take on a GPU; returns the names of those that ran."""

    def switch() -> set[str]:
        ran = set()
        for name, operation in OPDEFS.items():
            namespace, name = name.split("::")
            if namespace == "tandem" and "cuda" in operation._backend_fns:
                kernel = operation._backend_fns["cuda"]

                def noted(*arguments, name=name, kernel=kernel, **keywords):
                    ran.add(name)
                    return kernel(*arguments, **keywords)

                monkeypatch.setitem(operation._backend_fns, "cpu", noted)
        return ran

    return switch


def losses_and_gradients(decoder: Decoder) -> dict[str, Tensor]:
    decoder.zero_grad()
    losses = decoder(*tiny.rows(0, num_rows=2))
    losses.mean().backward()
    return {"losses": losses.detach(), **{name: p.grad.clone() for name, p in decoder.named_parameters()}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels where there is no GPU")
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_losses_and_gradients_are_those_of_the_meaning(variant, recompute, mesh, on_kernels):
    config = tiny.config(variant)
    decoder = models.build(config.model, config.mup, mesh, dtype=torch.float32, recompute=recompute)
    tensors = reference(config.model).random_tensors(config.model, seed=5)
    load_weights(decoder, tensors.__getitem__, mesh)
    meant = losses_and_gradients(decoder)
    ran = on_kernels()
    found = losses_and_gradients(decoder)
    assert ran == (EVERYWHERE if variant == "btlm" else EVERYWHERE | STABLELM)
    for name, mine in found.items():
        assert float((mine - meant[name]).norm()) <= 1e-5 * float(meant[name].norm()), name
