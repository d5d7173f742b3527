"""Initial values are a function of seed, name and true shape, whatever the layout."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tandem.trainer import models
from tandem.trainer.config import load_config
from tandem.trainer.distributed.mesh import Mesh
from tandem.trainer.models import init
from tandem.trainer.models.init import CHUNK_ELEMENTS, first_chunk_seed, initial_value
from tandem.trainer.models.mup import ParameterRule, parameter_rules
from tests import tiny_configs
from tests.reference.variants import reference_module
from tests.sharded import fill, joined

NORMAL = ParameterRule(init_std=0.02, init_value=0.0, lr_scale=1.0, has_weight_decay=True)
SHAPE = (200, 500)
SHIPPED = sorted(path.name for path in (Path(__file__).parents[3] / "configs").glob("*.yaml"))
WITH_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def drawn(seed: int = 1, name: str = "a", shape: tuple[int, ...] = SHAPE, sigmas: float = 0.0) -> Tensor:
    return initial_value(name, shape, NORMAL, seed=seed, truncation_sigmas=sigmas)


def test_same_arguments_same_bits_whatever_was_drawn_before():
    first = drawn()
    torch.rand(7)
    assert torch.equal(first, drawn())


@pytest.mark.skipif(not WITH_AVX2, reason="torch draws other last bits without AVX2")
@pytest.mark.parametrize(
    ("shape", "sigmas", "expected"),
    [
        ((5,), 2.0, "2821d406394b9b08"),
        ((700, 30), 0.0, "57474a8c424f02f0"),
        ((700, 30), 2.0, "e640b34c5689d570"),
        ((3, 500, 701), 0.0, "441980a404b6bc63"),
        ((3, 500, 701), 2.0, "c2b5c255e9aba246"),
        ((3, 500, 701), 0.5, "4b41be8f1e9a42b6"),
    ],
)
def test_values_are_the_same_bits_with_every_torch(shape, sigmas, expected):
    """The literals come from torch 2.13.0 on AVX-512. They were checked with 2.11.0 and 2.13.0, on AVX2 and AVX-512."""
    values = drawn(shape=shape, sigmas=sigmas)
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == expected


def test_values_are_the_same_bits_with_any_number_of_threads(monkeypatch):
    shape = (5, CHUNK_ELEMENTS - 1)
    several = drawn(shape=shape, sigmas=2.0)
    monkeypatch.setattr(init, "MAX_THREADS", 1)
    assert torch.equal(drawn(shape=shape, sigmas=2.0), several)
    torch.set_num_threads(3)
    try:
        assert torch.equal(drawn(shape=shape, sigmas=2.0), several)
    finally:
        torch.set_num_threads(1)


def test_pieces_of_a_tensor_are_uncorrelated():
    """The correlation is within 5 standard errors of zero, although the generators' seeds are neighbours."""
    pieces = drawn(shape=(8, CHUNK_ELEMENTS))
    off_diagonal = torch.corrcoef(pieces).fill_diagonal_(0.0)
    assert float(off_diagonal.abs().max()) < 5 / CHUNK_ELEMENTS**0.5


@pytest.mark.parametrize("file", SHIPPED)
def test_no_two_pieces_of_a_shipped_model_have_the_same_stream(file):
    """torch's CPU generator keeps only 32 bits of a seed, and a large model uses thousands of seeds."""
    config = load_config(Path(__file__).parents[3] / "configs" / file)
    seeds = [
        (first_chunk_seed(config.run.seed, name) + piece) % 2**32
        for name, shape in reference_module(config.model).shapes(config.model).items()
        for piece in range(math.ceil(math.prod(shape) / CHUNK_ELEMENTS))
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("other", [{"seed": 2}, {"name": "b"}])
def test_every_seed_and_name_has_values_of_its_own(other):
    """The values are also uncorrelated: within 5 standard errors of zero."""
    one, two = drawn().flatten(), drawn(**other).flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / one.numel() ** 0.5


@pytest.mark.parametrize(("sigmas", "realised"), [(0.0, 1.0), (2.0, 0.8796), (3.0, 0.9866)])
def test_deviation_and_cut_are_the_rules(sigmas, realised):
    """A normal truncated at k sigma without rescaling has variance 1 - 2 k phi(k) / (2 Phi(k) - 1)."""
    values = drawn(sigmas=sigmas) / NORMAL.init_std
    assert float(values.std()) == pytest.approx(realised, rel=5 / (2 * values.numel()) ** 0.5)
    assert abs(float(values.mean())) < 5 / values.numel() ** 0.5
    largest = float(values.abs().max())
    assert largest > 4 if not sigmas else 0.99 * sigmas < largest <= sigmas * (1 + 1e-6)


@pytest.mark.parametrize("sigmas", [0.1, 0.5, 2.0, 3.0])
def test_a_cut_normal_is_distributed_as_one(sigmas):
    """Kolmogorov's distance to (Phi(x) - Phi(-k)) / (Phi(k) - Phi(-k)) exceeds 2.7 / sqrt(n) with a chance of one in a million.

    The limit is 0.003. For a normal clamped at 2 sigma the distance is 0.02.
    """
    values = drawn(shape=(2, CHUNK_ELEMENTS - 3), sigmas=sigmas).flatten().double().sort().values / NORMAL.init_std
    inside = math.erf(sigmas / 2**0.5)
    expected = (torch.special.erf(values / 2**0.5) + inside) / (2 * inside)
    found = torch.arange(1, len(values) + 1) / len(values)
    assert float((found - expected).abs().max()) < 2.7 / len(values) ** 0.5
    assert float(values.abs().max()) <= sigmas * (1 + 2**-23)


def test_a_rule_without_deviation_is_its_value():
    norm = replace(NORMAL, init_std=0.0, init_value=1.0)
    assert torch.equal(initial_value("a", (3, 4), norm, seed=1, truncation_sigmas=2.0), torch.ones(3, 4))


def filled(variant: str, mesh: Mesh) -> dict[str, nn.Parameter]:
    config = tiny_configs.make_config(variant)
    model = models.build_model(config.model, config.mup, mesh, dtype=torch.float32)
    sigmas = config.model.init_truncation_sigmas
    fill(model, parameter_rules(config.model, config.mup), seed=3, truncation_sigmas=sigmas, mesh=mesh)
    return dict(model.named_parameters())


@pytest.mark.parametrize("variant", tiny_configs.VARIANTS)
def test_every_parameter_starts_as_its_role_does(pretended, variant):
    config = tiny_configs.make_config(variant)
    table, realised = parameter_rules(config.model, config.mup), 0.8796 if config.model.init_truncation_sigmas else 1.0
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
    """The concatenated slices have the same bits, followed only by zero padding."""
    with pretended(0, 1) as mesh:
        one = {name: joined(p.sharding, [p.detach()]) for name, p in filled(variant, mesh).items()}
    ranks = []
    for tp_rank in range(tp_size):
        with pretended(tp_rank, tp_size) as mesh:
            ranks.append(filled(variant, mesh))
    for name, full in one.items():
        shard, parts = ranks[0][name].sharding, [rank[name].detach() for rank in ranks]
        assert torch.equal(joined(shard, parts), full), name
        in_parts = sum(int(part.count_nonzero()) for part in parts if shard.sharded_dim is not None)
        assert in_parts == (int(full.count_nonzero()) if shard.sharded_dim is not None else 0), name
