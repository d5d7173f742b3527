"""Both models' forward and backward on a device without data: finds tensors left on the CPU and waits for the device.

The device is torch's "meta". Our operations run their fake implementation on it, and a value that the host would wait for does
not exist. Fake tensors on "cuda" would show no more: without CUDA, torch refuses to slice them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tandem.trainer import models
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models.decoder import Decoder
from tests import tiny_configs

META = torch.device("meta")


class OnOneDevice(TorchDispatchMode):
    """Refuse every operation that takes a tensor of another device, and every one that brings a value to the host."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = operation(*arguments, **keywords)
        for tensor in tree_leaves((arguments, keywords, result)):
            if isinstance(tensor, Tensor) and tensor.device != META:
                raise AssertionError(f"{operation} has a tensor of {list(tensor.shape)} on the {tensor.device}")
        return result


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield replace(mesh, device=META)


def built(variant: str, mesh: Mesh, recompute: str) -> Decoder:
    config = tiny_configs.make_config(variant)
    with META:
        return models.build_model(config.model, config.mup, mesh, dtype=torch.bfloat16, recompute=recompute)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_nothing_stays_on_the_cpu_and_nothing_is_waited_for(variant, recompute, mesh):
    model = built(variant, mesh, recompute)
    inputs = [tensor.to(META) for tensor in tiny_configs.global_batch(0, 2)]
    with OnOneDevice():
        loss = model(*inputs)
        loss.mean().backward()
    assert loss.device == META
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "slip",
    [
        lambda x: x * torch.ones(3),
        lambda x: x @ torch.ones(3, 3).T,
        lambda x: x[torch.tensor([0])],
        lambda x: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), x),
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: x + torch.ones(()),
        lambda x: x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
    ],
)
def test_a_slip_is_refused(slip):
    with OnOneDevice(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        slip(torch.ones(2, 3, device=META))
