"""Initial values are a function of seed, name and true shape; the layout only says where they lie."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from trainer import models
from trainer.models.init import fill, initial
from trainer.models.mup import Rule, rules
from trainer.parallel.mesh import Mesh
from trainer.parallel.shards import joined

NORMAL = Rule(init_std=0.02, init_value=0.0, lr_scale=1.0, decays=True)
SHAPE = (200, 500)


def drawn(seed: int = 1, name: str = "a", shape: tuple[int, ...] = SHAPE, sigmas: float = 0.0) -> Tensor:
    return initial(name, shape, NORMAL, seed=seed, truncation_sigmas=sigmas)


def test_same_arguments_same_bits_whatever_was_drawn_before():
    first = drawn()
    torch.rand(7)
    assert torch.equal(first, drawn())


@pytest.mark.parametrize("other", [{"seed": 2}, {"name": "b"}])
def test_every_seed_and_name_has_values_of_its_own(other):
    """Not only other values but uncorrelated ones: within 5 standard errors of zero."""
    one, two = drawn().flatten(), drawn(**other).flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / one.numel() ** 0.5


@pytest.mark.parametrize(("sigmas", "realised"), [(0.0, 1.0), (2.0, 0.8796), (3.0, 0.9866)])
def test_deviation_and_cut_are_the_rules(sigmas, realised):
    """A normal cut at k sigma and not rescaled has variance 1 - 2 k phi(k) / (2 Phi(k) - 1)."""
    values = drawn(sigmas=sigmas) / NORMAL.init_std
    assert float(values.std()) == pytest.approx(realised, rel=5 / (2 * values.numel()) ** 0.5)
    assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
    largest = float(values.abs().max())
    assert largest > 4 if not sigmas else 0.99 * sigmas < largest <= sigmas * (1 + 1e-6)


def test_a_rule_without_deviation_is_its_value():
    norm = replace(NORMAL, init_std=0.0, init_value=1.0)
    assert torch.equal(initial("a", (3, 4), norm, seed=1, truncation_sigmas=2.0), torch.ones(3, 4))


def filled(variant: str, mesh: Mesh) -> dict[str, nn.Parameter]:
    config = tiny.config(variant)
    model = models.build(config.model, config.mup, mesh, dtype=torch.float32)
    sigmas = config.model.init_truncation_sigmas
    fill(model, rules(config.model, config.mup), seed=3, truncation_sigmas=sigmas, mesh=mesh)
    return dict(model.named_parameters())


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_parameter_starts_as_its_role_does(pretended, variant):
    config = tiny.config(variant)
    table, realised = rules(config.model, config.mup), 0.8796 if config.model.init_truncation_sigmas else 1.0
    with pretended(0, 1) as mesh:
        for name, parameter in filled(variant, mesh).items():
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter))
            else:
                outputs = name.endswith(("out.weight", "down.weight"))
                role = "residual_output" if outputs else name.split(".")[0].replace("layers", "hidden")
                true = parameter.detach()[parameter != 0]
                expected = table[role].init_std * realised
                assert float(true.std()) == pytest.approx(expected, rel=5 / (2 * true.numel()) ** 0.5), name


@pytest.mark.parametrize(("variant", "tp_size"), [("btlm", 2), ("btlm", 4), ("stablelm", 2)])
def test_ranks_hold_slices_of_what_one_rank_holds(pretended, variant, tp_size):
    """Side by side they are the same bits, and behind them zeros only."""
    with pretended(0, 1) as mesh:
        one = {name: joined(p.shard, [p.detach()]) for name, p in filled(variant, mesh).items()}
    ranks = []
    for tp_rank in range(tp_size):
        with pretended(tp_rank, tp_size) as mesh:
            ranks.append(filled(variant, mesh))
    for name, full in one.items():
        shard, parts = ranks[0][name].shard, [rank[name].detach() for rank in ranks]
        assert torch.equal(joined(shard, parts), full), name
        in_parts = sum(int(part.count_nonzero()) for part in parts if shard.dim is not None)
        assert in_parts == (int(full.count_nonzero()) if shard.dim is not None else 0), name
