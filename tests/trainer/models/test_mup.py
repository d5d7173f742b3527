"""The table of the parametrization gives the numbers that were published for both models."""

from pathlib import Path

import pytest

from tandem.trainer.config import TrainConfig, load_config
from tandem.trainer.models.mup import ParameterRule, forward_scales, parameter_rules, width_multiplier
from tests import tiny_configs

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def btlm() -> TrainConfig:
    return load_config(CONFIGS / "btlm-3b-8k.yaml")


@pytest.fixture(scope="module")
def stablelm() -> TrainConfig:
    return load_config(CONFIGS / "stablelm-2-12b.yaml")


def test_btlm_starts_as_published(btlm):
    """Cerebras modelzoo: decoder std 0.073 / sqrt(10), residual outputs also / sqrt(64), each truncated at 2 sigma."""
    table = parameter_rules(btlm.model, btlm.mup)
    assert table["embedding"].init_std == 0.073
    assert table["hidden"].init_std == pytest.approx(0.0230846, rel=1e-5)
    assert table["residual_output"].init_std == pytest.approx(0.00288558, rel=1e-5)
    assert table["norm"] == ParameterRule(0.0, 1.0, 1.0, False)
    assert table["bias"] == ParameterRule(0.0, 0.0, 1.0, False)


def test_btlm_learns_at_the_published_rates(btlm):
    """Matrices get a tenth of the learning rate, everything else all of it. Matrices and embedding decay."""
    settings = {
        role: (rule.lr_scale, rule.has_weight_decay) for role, rule in parameter_rules(btlm.model, btlm.mup).items()
    }
    assert settings == {
        "embedding": (1.0, True), "head": (1.0, True), "hidden": (pytest.approx(0.1), True),
        "residual_output": (pytest.approx(0.1), True), "norm": (1.0, False), "bias": (1.0, False),
    }  # fmt: skip


def test_btlm_scales_as_published(btlm):
    scales = forward_scales(btlm.model, btlm.mup)
    assert (scales.embedding, scales.attention) == (14.6, 1 / 80)
    assert scales.logits == pytest.approx(0.222)


def test_stablelm_starts_and_scales_as_published(stablelm):
    """Stability-AI/StableLM: 0.01, residual outputs / sqrt(2 * 40); no muP."""
    table = parameter_rules(stablelm.model, stablelm.mup)
    assert {table[role].init_std for role in ("embedding", "head", "hidden")} == {0.01}
    assert table["residual_output"].init_std == pytest.approx(1.118e-3, rel=1e-4)
    assert {rule.lr_scale for rule in table.values()} == {1.0}
    scales = forward_scales(stablelm.model, stablelm.mup)
    assert (scales.embedding, scales.logits, scales.attention) == (1.0, 1.0, 160**-0.5)


def test_at_the_base_width_only_the_multipliers_are_left(btlm):
    config = tiny_configs.make_config("btlm", mup={"base_hidden_size": 64})
    assert width_multiplier(config.model, config.mup) == 1.0
    assert parameter_rules(config.model, config.mup) == parameter_rules(config.model, None)
    assert forward_scales(config.model, config.mup).logits == config.mup.output_multiplier


def test_a_model_twice_as_wide_halves_rates_and_variances():
    config, wide = tiny_configs.make_config("btlm"), tiny_configs.make_config("btlm", model={"hidden_size": 128})
    narrow_table, wide_table = parameter_rules(config.model, config.mup), parameter_rules(wide.model, wide.mup)
    for role in ("hidden", "residual_output"):
        assert wide_table[role].lr_scale == narrow_table[role].lr_scale / 2
        assert wide_table[role].init_std ** 2 == pytest.approx(narrow_table[role].init_std ** 2 / 2)
    for role in ("embedding", "norm", "bias"):
        assert wide_table[role] == narrow_table[role]
    narrow_scales, wide_scales = forward_scales(config.model, config.mup), forward_scales(wide.model, wide.mup)
    assert wide_scales.logits == narrow_scales.logits / 2
    assert wide_scales.embedding == narrow_scales.embedding
