"""The bytes per token that a layer keeps for backward: ours match a formula, and plain torch and Liger keep no less."""

import json
import os
import subprocess
import sys

import pytest

from tandem.kernels.bench.shapes import MODELS, Model


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes by model, implementation and part, counted in a process where Triton compiles."""
    file = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.rivals.kernels", "--activations", "--json", file]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(told.stdout.splitlines()) == 2 + 4 * len(MODELS)
    assert "FP_FUSION" not in told.stderr
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        assert {"device", "torch", "triton", "commit"} <= set(row)
        found.setdefault(row.pop("model"), {})[row.pop("implementation")] = row
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_widest_activation_is_kept_twice_where_torch_keeps_it_four_times(model: Model, kept) -> None:
    """Gate and up, plus their product (ours, Liger, torch), plus silu of the gate (torch), plus the network's input."""
    for kit, times in (("ours, product made again", 2), ("ours", 3), ("liger", 3), ("torch", 4)):
        found = kept[model.name][kit]["feed-forward"]
        # BTLM's network has its own norm. With a parallel residual, attention's norm already keeps that input.
        inputs = model.hidden_size if model.rotary_dims == 0 else 0
        assert found == 2 * (times * model.ffn_hidden_size + inputs), kit


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_heads_and_attention_keep_what_backward_reads(model: Model, kept) -> None:
    found = kept[model.name]["ours"]
    fused = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    # The projection, if the norms' backward reads it.
    assert found["heads"] == 2 * fused * model.qk_layernorm
    # Queries, keys, values and result; one fp32 logarithm per head.
    assert found["attention"] == 2 * (fused + model.num_heads * model.head_dim) + 4 * model.num_heads


def test_a_layer_keeps_less_than_the_rivals_layer(kept) -> None:
    for kits in kept.values():
        assert kits["ours, product made again"]["total"] < kits["liger"]["total"] < kits["torch"]["total"]
        assert kits["ours"]["total"] <= kits["liger"]["total"]
