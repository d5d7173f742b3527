"""The optimizer's groups follow the table, and every parameter is in exactly one group."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.trainer import models
from tandem.trainer.config import TrainConfig, load_config
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models import param_groups
from tandem.trainer.models.mup import parameter_rules

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


def groups(file: str, mesh: Mesh) -> tuple[TrainConfig, dict[str, dict], dict[str, str]]:
    """Return the config, its groups by name, and each parameter's group."""
    config = load_config(CONFIGS / file, ["model.num_layers=2"])
    meta = torch.device("meta")
    with meta:
        model = models.build_model(
            config.model, config.mup, Mesh(**vars(mesh) | {"device": meta}), dtype=torch.bfloat16
        )
    found = param_groups.build_param_groups(model, parameter_rules(config.model, config.mup), config.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = [(names[id(parameter)], group["name"]) for group in found for parameter in group["params"]]
    assert sorted(name for name, _ in of) == sorted(names.values())
    return config, {group["name"]: group for group in found}, dict(of)


def test_btlm_has_the_published_three_groups(mesh):
    """0.1 for matrices with decay, 1.0 for the embedding with decay, 1.0 for biases and norms without."""
    _, found, of = groups("btlm-3b-8k.yaml", mesh)
    settings = {name: (group["lr_scale"], group["weight_decay"]) for name, group in found.items()}
    assert settings == {
        "decay_lr_x1": (1.0, 0.1), "decay_lr_x0.1": (pytest.approx(0.1), 0.1), "no_decay_lr_x1": (1.0, 0.0),
    }  # fmt: skip
    for name, group in of.items():
        if name.endswith("bias") or "norm" in name:
            assert group == "no_decay_lr_x1", name
        else:
            assert group == ("decay_lr_x1" if name == "embedding.weight" else "decay_lr_x0.1"), name


def test_stablelm_decays_matrices_and_not_norms(mesh):
    config, found, of = groups("stablelm-2-12b.yaml", mesh)
    assert {group["lr_scale"] for group in found.values()} == {1.0}
    assert found["decay_lr_x1"]["weight_decay"] == config.optim.weight_decay > 0
    assert found["no_decay_lr_x1"]["weight_decay"] == 0.0
    assert all((group == "no_decay_lr_x1") == ("norm" in name) for name, group in of.items())


def test_adamw_takes_the_sections_numbers(mesh):
    config, found, _ = groups("btlm-3b-8k.yaml", mesh)
    adamw = param_groups.build_adamw(list(found.values()), config.optim, torch.device("cpu"))
    for group in adamw.param_groups:
        assert group["betas"] == (config.optim.beta1, config.optim.beta2)
        assert group["eps"] == config.optim.eps
        assert group["lr"] == 0.0  # until the schedule sets it
        assert not group["amsgrad"]
