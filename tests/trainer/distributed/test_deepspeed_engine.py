"""The parts of an update that guard and saver use: the norm before it, dropping a gradient, and blocking updates."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tandem.trainer.config import UserError
from tandem.trainer.distributed.deepspeed_engine import Engine, clip_coefficient
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.startup import build_engine
from tests import ranks, tiny_configs

LR = 1e-2
KINDS = {"zero0": {"zero_stage": 0}, "zero1": {"zero_stage": 1}, "bf16": {"zero_stage": 1}}
"""DeepSpeed has a different optimizer for each."""
ONE_LAYER = {"num_layers": 1}


def engine(kind: str, mesh: Mesh, variant: str = "btlm", recompute: str = "none", **sections: dict) -> Engine:
    precision = "bf16" if kind == "bf16" else "fp32"
    parallel = {"tp_size": mesh.tp_size, "recompute": recompute, **KINDS[kind]}
    return build_engine(
        tiny_configs.make_config(variant, run={"precision": precision}, parallel=parallel, **sections), mesh, None
    )


def share(rows: tuple[Tensor, ...], mesh: Mesh) -> tuple[Tensor, ...]:
    return tuple(tensor.chunk(mesh.dp_size)[mesh.dp_rank] for tensor in rows)


def accumulate(one: Engine, mesh: Mesh, step: int, factor: float = 1.0) -> list[float]:
    """Accumulate the gradient of a step of two micro-batches; return their losses."""
    parts = list(zip(*(tensor.chunk(2) for tensor in share(tiny_configs.global_batch(step), mesh)), strict=True))
    losses = []
    for index, part in enumerate(parts):
        loss = factor * one(*part).mean() / 2
        one.backward(loss, is_last=index == 1)
        losses.append(float(loss.detach()))
    return losses


def update(one: Engine, mesh: Mesh, step: int) -> float:
    accumulate(one, mesh, step)
    norm = float(one.grad_norm())
    one.update(LR)
    return norm


def state(one: Engine) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    for fragment in one.optimizer_fragments():
        kinds = {"master": fragment.master, **fragment.moments}
        found |= {f"{fragment.name} {kind}": tensor.clone() for kind, tensor in kinds.items()}
    return found


def dropped(kind: str, mesh: Mesh) -> dict[str, bool]:
    """Compare two updates with a dropped gradient between them, finite or not, with the same two updates alone."""
    found, other = {}, engine(kind, mesh, model=ONE_LAYER)
    norms, theirs = [update(other, mesh, step) for step in (0, 1)], state(other)
    for name, factor in {"finite": 1.0, "infinite": math.inf, "nan": math.nan}.items():
        one = engine(kind, mesh, model=ONE_LAYER)
        assert update(one, mesh, 0) == norms[0]
        before = state(one)
        accumulate(one, mesh, 5, factor)
        norm = float(one.grad_norm())
        one.zero_grad()
        assert (norm > 0) if name == "finite" else math.isnan(norm), norm
        same = [torch.equal(before[key], tensor) for key, tensor in state(one).items()]
        same += [update(one, mesh, 1) == norms[1], one.num_updates == other.num_updates == 2]
        same += [torch.equal(theirs[key], tensor) for key, tensor in state(one).items()]
        found[name] = all(same)
    return found


def theirs(one: Engine) -> float:
    """Make the update with DeepSpeed's own step; return the norm that it computed."""
    for group in one._optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    one._deepspeed_engine.step()
    return float(one._deepspeed_engine.get_global_grad_norm())


def beside_deepspeed(
    variant: str, mesh: Mesh, recompute: str = "none", max_grad_norm: float = 1.0, model: dict | None = None
) -> dict[str, bool]:
    """Compare steps of this engine with DeepSpeed's own, and report which facts are equal bit by bit. One gradient is dropped.

    DeepSpeed adds gradients after backward, through fp32 copies, and computes the norm again to clip by it.
    """
    sections = {"optim": {"max_grad_norm": max_grad_norm}, "model": model or {}}
    one = engine("bf16", mesh, variant, recompute, **sections)
    other = engine("bf16", mesh, variant, recompute, debug={"immediate_gradients": False}, **sections)
    found = dict.fromkeys(SAME, True)
    for step, factor in enumerate((1.0, 30.0, math.inf, 1.0)):
        losses = [accumulate(each, mesh, step, factor) for each in (one, other)]
        sums = [each._deepspeed_engine.optimizer.fp32_groups_gradients_flat for each in (one, other)]
        norm = float(one.grad_norm())
        found["losses"] &= losses[0] == losses[1]
        if factor == math.inf:
            assert math.isnan(norm), norm
            one.zero_grad()
            other.zero_grad()
        else:
            found["gradients"] &= all(torch.equal(mine, its) for mine, its in zip(*sums, strict=True))
            one.update(LR, norm)
            found["norms"] &= norm == theirs(other) > 0
        its = state(other)
        found["state"] &= all(torch.equal(its[key], tensor) for key, tensor in state(one).items())
    return found


SAME = dict.fromkeys(("losses", "gradients", "norms", "state"), True)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_gradient_was_never_there(mesh, kind):
    assert dropped(kind, mesh) == {"finite": True, "infinite": True, "nan": True}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_steps_are_the_bits_of_deepspeeds_own(mesh, variant, recompute):
    assert beside_deepspeed(variant, mesh, recompute) == SAME


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e3])
def test_clipping_is_to_the_bit_as_deepspeeds(mesh, max_grad_norm):
    assert beside_deepspeed("btlm", mesh, max_grad_norm=max_grad_norm, model=ONE_LAYER) == SAME


def test_the_factor_of_clipping_is_the_one_of_the_device_for_any_norm(generator):
    """DeepSpeed computes it as an fp32 tensor."""
    norms = torch.cat((10 ** (20 * torch.rand(10_000, generator=generator) - 10), torch.tensor([0.0, 1.0, 3e38])))
    for max_norm in (1.0, 0.05, 1e-3, 7.3):
        expected = max_norm / (norms + 1e-6)
        assert [clip_coefficient(norm, max_norm) for norm in norms.tolist()] == expected.tolist()


def test_a_gradient_is_freed_as_soon_as_it_is_added(mesh):
    one, other = engine("bf16", mesh), engine("bf16", mesh, debug={"immediate_gradients": False})
    for each in (one, other):
        accumulate(each, mesh, 0)
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert all(parameter.grad is not None for parameter in other.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeeds_own_clock_which_waits_for_the_device_is_off(mesh, kind):
    one = engine(kind, mesh)
    for step in range(3):
        update(one, mesh, step)
    assert (one._deepspeed_engine.tput_timer.initialized, one._deepspeed_engine.tput_timer.global_step_count) == (
        False,
        0,
    )


def on_four(folder: Path) -> dict[str, dict[str, bool]]:
    with mesh_context(2) as mesh:
        found = {kind: dropped(kind, mesh) for kind in KINDS}
        return found | {variant: beside_deepspeed(variant, mesh) for variant in tiny_configs.VARIANTS}


@pytest.mark.dist
def test_four_ranks_drop_gradients_and_step_as_one_does(tmp_path):
    """A dropped gradient has no effect, and steps give the bits of DeepSpeed's own."""
    dropped = {kind: {"finite": True, "infinite": True, "nan": True} for kind in KINDS}
    for found in ranks.run(on_four, 4, tmp_path, tmp_path):
        assert found == dropped | dict.fromkeys(tiny_configs.VARIANTS, SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_can_be_asked_for_twice_and_is_the_one_that_is_clipped_by(mesh, kind):
    one = engine(kind, mesh)
    accumulate(one, mesh, 0)
    assert one.grad_norm() == one.grad_norm() > 0
    norm = float(one.grad_norm())
    if kind == "bf16":
        assert theirs(one) == norm  # and `test_steps_are_the_bits_of_deepspeeds_own`
    else:
        one.update(LR)
    if kind == "zero1":
        assert float(one._deepspeed_engine.get_global_grad_norm()) == norm


@pytest.mark.parametrize("kind", KINDS)
def test_state_on_hold_changes_only_after_the_wait(mesh, kind):
    one = engine(kind, mesh)
    update(one, mesh, 0)
    before, seen = state(one), []
    one.wait_before_update = lambda: seen.append(
        all(torch.equal(before[key], tensor) for key, tensor in state(one).items())
    )
    update(one, mesh, 1)
    assert seen == [True]
    one.allocate_moments(2)
    assert len(seen) == 2


def test_deepspeed_on_another_device_than_the_model_is_refused(mesh):
    """Otherwise DeepSpeed would silently move the model to its own device."""
    config = tiny_configs.make_config("btlm")
    elsewhere = replace(mesh, device=torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"DS_ACCELERATOR: DeepSpeed would use cpu, .* is cuda:0; unset the variable"):
        Engine(config, torch.nn.Linear(1, 1), torch.optim.AdamW([torch.zeros(1)]), elsewhere)
