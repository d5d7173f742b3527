"""Parameters and FLOPs match the published numbers of both families."""

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.trainer import config
from tandem.trainer.config import BTLMConfig, StableLMConfig, flops

CONFIGS = Path(__file__).parents[3] / "configs"


def model(name: str) -> StableLMConfig | BTLMConfig:
    return config.load_config(CONFIGS / f"{name}.yaml").model


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("stablelm-2-12b", 12_142_976_000),
        ("stablelm-2-1_6b", 1_644_515_328),  # the released file's size / 2 bytes
        ("btlm-3b-8k", 2_646_255_744),
    ],
)
def test_parameters_are_the_published_ones(name: str, published: int) -> None:
    assert flops.num_parameters(model(name)) == published


@pytest.mark.parametrize(
    ("name", "tp_size", "published"), [("stablelm-2-12b", 2, 12_143_605_760), ("stablelm-2-1_6b", 1, 1_644_417_024)]
)
def test_the_counts_of_the_model_cards_differ_by_norms_alone(name: str, tp_size: int, published: int) -> None:
    """GPT-NeoX counts norms over hidden_size once per tensor-parallel rank. It builds two norms per layer, used or not, with a
    weight each, and a final norm with weight and bias. (`use_bias_in_norms` is false in both.)
    """
    section = model(name)
    norms_a_layer = 1 if section.parallel_residual else 2
    vectors = (norms_a_layer * section.num_layers + 1) * (2 if section.norm_bias else 1)
    without_norms = flops.num_parameters(section) - vectors * section.hidden_size
    counted_vectors = 2 * section.num_layers + 2
    assert without_norms + tp_size * counted_vectors * section.hidden_size == published


def test_stablelm_norm_biases_count_as_hugging_face_does() -> None:
    """transformers gives the 12B a bias on every norm over the width."""
    assert flops.num_parameters(replace(model("stablelm-2-12b"), norm_bias=True)) == 12_143_185_920


def test_parts_of_btlm() -> None:
    parts = flops.num_parameters_by_part(model("btlm-3b-8k"))
    assert parts["embedding"] == 128_657_920
    assert parts["attention"] + parts["ffn"] == 2_516_418_560
    assert parts["biases"] == 846_464
    assert parts["norms"] == 332_800
    assert parts["head"] == 0


def test_parts_of_stablelm_12b() -> None:
    parts = flops.num_parameters_by_part(model("stablelm-2-12b"))
    assert parts["embedding"] == parts["head"] == 513_802_240
    assert parts["attention"] + parts["ffn"] == 40 * 277_872_640
    assert parts["norms"] == 41 * 5_120 + 40 * 6_400
    assert parts["biases"] == 0


@pytest.mark.parametrize(
    ("name", "seq_len", "full_gflops", "causal_gflops"),
    [
        ("stablelm-2-12b", 4_096, 79.84, 74.81),
        ("btlm-3b-8k", 2_048, 17.88, 16.88),
        ("btlm-3b-8k", 8_192, 23.92, 19.90),
    ],
)
def test_flops_under_both_conventions(name: str, seq_len: int, full_gflops: float, causal_gflops: float) -> None:
    assert round(flops.flops_per_token(model(name), seq_len, causal=False) / 1e9, 2) == full_gflops
    assert round(flops.flops_per_token(model(name), seq_len, causal=True) / 1e9, 2) == causal_gflops
