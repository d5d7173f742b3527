"""Both models give the same with the GPU's kernels as with their plain-torch meaning: on a GPU, or in Triton's interpreter."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandem.trainer import models
from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models.decoder import Decoder
from tests import tiny_configs
from tests.reference.variants import reference_module
from tests.triton_interpreter import run_kernels_on_cpu

EVERYWHERE = {
    "attention",
    "attention_backward",
    "cross_entropy_add",
    "cross_entropy_gradient",
    "swiglu",
    "swiglu_backward",
}
IN_THE_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels where there is no GPU")
STABLELM = {"split_and_rotate_qkv", "split_and_rotate_qkv_backward"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


@pytest.fixture
def on_kernels(monkeypatch):
    """on_kernels() makes operations on the CPU run their GPU kernels from then on, and returns the set of names that ran."""
    return lambda: run_kernels_on_cpu(monkeypatch)


def built(variant: str, mesh: Mesh, dtype: torch.dtype, recompute: str = "none") -> Decoder:
    """Build a model with weights that are exact in bf16, so they are the same in any dtype."""
    config = tiny_configs.make_config(variant)
    decoder = models.build_model(config.model, config.mup, mesh, dtype=dtype, recompute=recompute)
    tensors = reference_module(config.model).random_tensors(config.model, seed=5)
    load_weights(decoder, lambda name: tensors[name].bfloat16().float(), mesh)
    return decoder.to(mesh.device)


def losses_and_gradients(decoder: Decoder, rows: int = 2) -> dict[str, Tensor]:
    decoder.zero_grad()
    device = next(decoder.parameters()).device
    losses = decoder(*(x.to(device) for x in tiny_configs.global_batch(0, rows)))
    losses.mean().backward()
    found = {"losses": losses.detach(), **{name: p.grad for name, p in decoder.named_parameters()}}
    return {name: x.to("cpu", torch.float32, copy=True) for name, x in found.items()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name, in the norm."""
    return {name: float((mine - exact[name]).norm() / exact[name].norm()) for name, mine in found.items()}


def assert_at_most_a_tenth_above(found: dict[str, Tensor], meant: list[dict[str, Tensor]]) -> None:
    """Compare the error of the losses and of all gradients together: a single gradient has too few numbers."""
    exact, in_bf16 = meant
    ours, plain = errors(found, exact), errors(in_bf16, exact)
    assert 0 < ours.pop("losses") <= 1.1 * plain.pop("losses")
    assert 0 < math.hypot(*ours.values()) <= 1.1 * math.hypot(*plain.values())


@IN_THE_INTERPRETER
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_losses_and_gradients_are_those_of_the_meaning(variant, recompute, mesh, on_kernels):
    """The runs without recomputation have two rows. With it, one row is enough."""
    decoder, rows = built(variant, mesh, torch.float32, recompute), 2 if recompute == "none" else 1
    meant = losses_and_gradients(decoder, rows)
    ran = on_kernels()
    off = errors(losses_and_gradients(decoder, rows), meant)
    assert ran == (EVERYWHERE if variant == "btlm" else EVERYWHERE | STABLELM)
    # A few hundred operations in sequence, each rounded to fp32 up or down: the square root of as many roundings.
    assert max(off.values()) <= 16 * 2**-24, off


@IN_THE_INTERPRETER
@pytest.mark.parametrize("variant", ["btlm", "stablelm"])
def test_bf16_errors_are_at_most_a_tenth_above_those_of_the_meaning(variant, mesh, on_kernels):
    meant = [losses_and_gradients(built(variant, mesh, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    on_kernels()
    assert_at_most_a_tenth_above(losses_and_gradients(built(variant, mesh, torch.bfloat16)), meant)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_bf16_errors_on_a_gpu_are_at_most_a_tenth_above_those_of_the_meaning(variant, mesh):
    cpu = replace(mesh, device=torch.device("cpu"))
    meant = [losses_and_gradients(built(variant, cpu, dtype), 64) for dtype in (torch.float32, torch.bfloat16)]
    assert_at_most_a_tenth_above(losses_and_gradients(built(variant, mesh, torch.bfloat16), 64), meant)
