"""The parts of an update that the guard and the saver need: the norm before it, a gradient that is dropped, a state on hold."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import ranks, tiny
from trainer.engine import Engine
from trainer.parallel.mesh import Mesh, started
from trainer.setup import build_engine

LR = 1e-2
KINDS = {"zero0": {"zero_stage": 0}, "zero1": {"zero_stage": 1}, "bf16": {"zero_stage": 1}}
"""DeepSpeed has another optimizer for each."""


def engine(kind: str, mesh: Mesh, variant: str = "btlm", recompute: str = "none", **sections: dict) -> Engine:
    precision = "bf16" if kind == "bf16" else "fp32"
    parallel = {"tp_size": mesh.tp_size, "recompute": recompute, **KINDS[kind]}
    return build_engine(tiny.config(variant, run={"precision": precision}, parallel=parallel, **sections), mesh, None)


def share(rows: tuple[Tensor, ...], mesh: Mesh) -> tuple[Tensor, ...]:
    return tuple(tensor.chunk(mesh.dp_size)[mesh.dp_rank] for tensor in rows)


def accumulate(one: Engine, mesh: Mesh, step: int, factor: float = 1.0) -> list[float]:
    """The gradient of a step, of two micro-batches; returns their losses."""
    parts = list(zip(*(tensor.chunk(2) for tensor in share(tiny.rows(step), mesh)), strict=True))
    losses = []
    for index, part in enumerate(parts):
        loss = factor * one(*part).mean() / 2
        one.accumulate(loss, last=index == 1)
        losses.append(float(loss.detach()))
    return losses


def update(one: Engine, mesh: Mesh, step: int) -> float:
    accumulate(one, mesh, step)
    norm = one.gradient_norm()
    one.update(LR)
    return norm


def state(one: Engine) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}
    for fragment in one.fragments():
        kinds = {"master": fragment.master, **fragment.moments}
        found |= {f"{fragment.name} {kind}": tensor.clone() for kind, tensor in kinds.items()}
    return found


def dropped(kind: str, mesh: Mesh) -> dict[str, bool]:
    """A gradient dropped between two updates, finite or not, beside the same two updates alone."""
    found = {}
    for name, factor in {"finite": 1.0, "infinite": math.inf, "nan": math.nan}.items():
        one, other = engine(kind, mesh), engine(kind, mesh)
        update(one, mesh, 0)
        update(other, mesh, 0)
        before = state(one)
        accumulate(one, mesh, 5, factor)
        norm = one.gradient_norm()
        one.drop_gradient()
        assert (norm > 0) if name == "finite" else math.isnan(norm), norm
        same = [torch.equal(before[key], tensor) for key, tensor in state(one).items()]
        same += [update(one, mesh, 1) == update(other, mesh, 1), one.num_updates == other.num_updates == 2]
        theirs = state(other)
        same += [torch.equal(theirs[key], tensor) for key, tensor in state(one).items()]
        found[name] = all(same)
    return found


def added_at_once(variant: str, recompute: str, mesh: Mesh) -> dict[str, bool]:
    """Steps whose gradients are added during backward beside the same steps whose gradients are added after it, one of them
    dropped: what is the same, bit for bit.
    """
    one, other = (
        engine("bf16", mesh, variant, recompute, debug={"immediate_gradients": immediate})
        for immediate in (True, False)
    )
    found = dict.fromkeys(("losses", "gradients", "norms", "state"), True)
    for step, factor in enumerate((1.0, 30.0, math.inf, 1.0)):
        losses = [accumulate(each, mesh, step, factor) for each in (one, other)]
        sums = [each._inner.optimizer.fp32_groups_gradients_flat for each in (one, other)]
        norms = [each.gradient_norm() for each in (one, other)]
        found["losses"] &= losses[0] == losses[1]
        if factor == math.inf:
            assert all(map(math.isnan, norms)), norms
            for each in (one, other):
                each.drop_gradient()
        else:
            found["gradients"] &= all(torch.equal(mine, its) for mine, its in zip(*sums, strict=True))
            found["norms"] &= norms[0] == norms[1] > 0
            for each in (one, other):
                each.update(LR)
        its = state(other)
        found["state"] &= all(torch.equal(its[key], tensor) for key, tensor in state(one).items())
    return found


SAME = dict.fromkeys(("losses", "gradients", "norms", "state"), True)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with started(1) as mesh:
        yield mesh


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_gradient_was_never_there(mesh, kind):
    assert dropped(kind, mesh) == {"finite": True, "infinite": True, "nan": True}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_gradients_added_during_backward_are_the_bits_of_those_added_after_it(mesh, variant, recompute):
    assert added_at_once(variant, recompute, mesh) == SAME


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
    assert (one._inner.tput_timer.initialized, one._inner.tput_timer.global_step_count) == (False, 0)


def on_four(folder: Path) -> dict[str, dict[str, bool]]:
    with started(2) as mesh:
        found = {kind: dropped(kind, mesh) for kind in KINDS}
        return found | {variant: added_at_once(variant, "none", mesh) for variant in tiny.VARIANTS}


@pytest.mark.dist
def test_dropped_and_immediate_gradients_on_four_ranks(tmp_path):
    """As on one: a dropped gradient was never there, and gradients added during backward are those added after it."""
    dropped = {kind: {"finite": True, "infinite": True, "nan": True} for kind in KINDS}
    for found in ranks.run(on_four, 4, tmp_path, tmp_path):
        assert found == dropped | dict.fromkeys(tiny.VARIANTS, SAME)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_can_be_asked_for_twice_and_is_the_one_that_is_clipped_by(mesh, kind):
    one = engine(kind, mesh)
    accumulate(one, mesh, 0)
    assert one.gradient_norm() == one.gradient_norm() > 0
    norm = one.gradient_norm()
    one.update(LR)
    if KINDS[kind]["zero_stage"]:
        assert float(one._inner.get_global_grad_norm()) == norm


@pytest.mark.parametrize("kind", KINDS)
def test_state_on_hold_changes_only_after_the_wait(mesh, kind):
    one = engine(kind, mesh)
    update(one, mesh, 0)
    before, seen = state(one), []
    one.hold(lambda: seen.append(all(torch.equal(before[key], tensor) for key, tensor in state(one).items())))
    update(one, mesh, 1)
    assert seen == [True]
    one.allocate_moments(2)
    assert len(seen) == 2
