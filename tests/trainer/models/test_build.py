"""Every shipped model at full size on the meta device: its parameters, and each rank's share of them."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from tandem.trainer import models
from tandem.trainer.config import TrainConfig, flops, load_config
from tandem.trainer.models.decoder import Decoder
from tests.reference.variants import reference_module

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))}
PUBLISHED = {"stablelm-2-12b": 12_142_976_000, "btlm-3b-8k": 2_646_255_744}


@pytest.fixture(scope="module")
def built(pretended) -> Callable[[str, int], tuple[TrainConfig, Decoder]]:
    """built(name, tp_size) returns the shipped config and the last rank's model on the meta device."""
    cache: dict[tuple[str, int], tuple[TrainConfig, Decoder]] = {}

    def build(name: str, tp_size: int) -> tuple[TrainConfig, Decoder]:
        if (name, tp_size) not in cache:
            config, meta = load_config(CONFIGS[name]), torch.device("meta")
            with pretended(tp_size - 1, tp_size) as mesh, meta:
                model = models.build_model(config.model, config.mup, replace(mesh, device=meta), dtype=torch.bfloat16)
            cache[name, tp_size] = config, model
        return cache[name, tp_size]

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_unique_parameters_are_the_plans(built, name):
    config, model = built(name, 1)
    unique = sum(prod(parameter.sharding.global_shape) for parameter in model.parameters())
    assert unique == flops.num_parameters(config.model) == PUBLISHED.get(name, unique)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_true_shapes_are_the_references(built, name):
    config, model = built(name, 1)
    found = {name: parameter.sharding.global_shape for name, parameter in model.named_parameters()}
    assert found == reference_module(config.model).shapes(config.model)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_holds_its_share_and_less_padding_than_one_multiple(built, name, tp_size):
    if load_config(CONFIGS[name]).model.num_kv_heads % tp_size:
        pytest.skip("its key heads are not divisible by this number of ranks")
    _, model = built(name, tp_size)
    for parameter in model.parameters():
        shard = parameter.sharding
        assert parameter.is_meta
        assert parameter.dtype == torch.bfloat16
        assert parameter.numel() == prod(shard.local_shape(tp_size))
        assert parameter.tensor_model_parallel == (shard.sharded_dim is not None)
        if shard.sharded_dim is None:
            continue
        padding = shard.padded_size - shard.global_shape[shard.sharded_dim]
        assert 0 <= padding < 128 * tp_size
        assert padding == 0 or shard.padded_size % (128 * tp_size) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_a_norm_or_an_output_bias_is_divided(built, name):
    """A replicated matrix would train correctly but waste the memory that tensor parallelism saves."""
    _, model = built(name, 2)
    for name, parameter in model.named_parameters():
        norm_of_the_stream = "norm." in name and len(parameter.sharding.global_shape) == 1
        whole = norm_of_the_stream or name.endswith(("out.bias", "down.bias"))
        assert (parameter.sharding.sharded_dim is None) == whole, name
