"""Padding is invisible: sizes that divide by nothing are trained, saved and exported as they are.

Two runs stand beside the padded one. One owns no padding (`tests.reference.unpadded`) but computes over the same borders:
BTLM's ffn_hidden_size and vocabulary, 50 steps, the same bits. The other has no padding anywhere, products included, which
moves the borders between the ranks' shares and the blocks of a product; sums over a padded dim are then grouped differently and
agree to the rounding of fp32 only. Bitwise in both: that padding is zero, and that a checkpoint fits every layout.
"""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import WEIGHTS_FILE
from tandem.trainer.checkpoint.layout import model_metadata
from tandem.trainer.checkpoint.read import open_checkpoint
from tandem.trainer.config import TrainConfig, padding
from tandem.trainer.distributed.deepspeed_engine import Engine
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.distributed.sharding import TensorSharding, slice_local
from tandem.trainer.models import param_groups
from tandem.trainer.models.mup import parameter_rules
from tandem.trainer.run_state import StepContext
from tandem.trainer.startup import build_engine
from tests import ranks, steps, tiny_configs
from tests.reference.unpadded import UnpaddedModel
from tests.reference.variants import reference_module
from tests.sharded import joined, save_checkpoint

STEPS, LONG_STEPS = 5, 50
VARIANTS = ("btlm", "stablelm")
EPSILON = 1e-2
"""Above the size of the gradients, so that AdamW does not divide rounding noise by rounding noise."""

every_variant = pytest.mark.parametrize("variant", VARIANTS)
pytestmark = pytest.mark.dist


def config(variant: str) -> TrainConfig:
    """170 and 176 in the feed-forward network, 500 in the vocabulary; 256 and 512 with padding."""
    return tiny_configs.make_config(variant, parallel={"tp_size": 2}, optim={"eps": EPSILON})


def train_all(folder: Path) -> dict[str, dict]:
    """Every variant as it is, and without padding; a checkpoint of each padded one below `folder`."""
    found = {}
    with mesh_context(2) as mesh:
        for variant in VARIANTS:
            found[variant] = train(config(variant), mesh, folder / variant)
            with patch.object(padding, "PADDING_MULTIPLE", 1):
                found[f"{variant}/unpadded"] = train(config(variant), mesh, None)
                found[f"{variant}/reloaded"] = reload(config(variant), mesh, folder / variant)
    return found


def train(config: TrainConfig, mesh: Mesh, checkpoints: Path | None) -> dict:
    """True tensors before and after the steps, and the largest padding among weights and optimizer state."""
    engine = build_engine(config, mesh, None)
    initial = gathered(engine)
    stepper = steps.steady(config, mesh, engine, lr=1e-2, micro_batch_size=tiny_configs.GLOBAL_BATCH_SIZE)
    norms = [steps.step(stepper, step)[1] for step in range(STEPS)]
    if checkpoints:
        facts = {**model_metadata(config.model, config.mup), "tokens": 0, "cursor": {}, "fingerprints": {}}
        save_checkpoint(checkpoints, STEPS, engine, mesh, metadata=facts)
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.model.named_parameters()}
    return {"initial": initial, "trained": gathered(engine), "padding": largest_padding(engine, mesh), "norms": norms,
            "shapes": shapes}  # fmt: skip


def reload(config: TrainConfig, mesh: Mesh, checkpoints: Path) -> dict:
    engine = build_engine(config, mesh, open_checkpoint(checkpoints))
    return {"trained": gathered(engine)}


def train_odd(tp_size: int) -> dict[str, dict]:
    """Every variant with BTLM's odd sizes, padded and beside it without: which values were ever not the same bits."""
    found = {}
    with mesh_context(tp_size) as mesh:
        for variant in VARIANTS:
            config, wide = odd(variant, tp_size), build_engine(odd(variant, tp_size), mesh, None)
            true = UnpaddedModel(build_engine(config, mesh, None).model, mesh)
            groups = param_groups.build_param_groups(true, parameter_rules(config.model, config.mup), config.optim)
            narrow = Engine(config, true, param_groups.build_adamw(groups, config.optim, mesh.device), mesh)
            steppers = [steps.steady(config, mesh, engine, lr=1e-2) for engine in (wide, narrow)]
            made = [both(steppers, step) for step in range(LONG_STEPS)]
            found[variant] = {
                "steps": [step for step, (with_padding, without) in enumerate(made) if with_padding != without],
                "norms": [norm for (_, norm), _ in made],
                "tensors": differing(wide, narrow, true, mesh),
                "padding": largest_padding(wide, mesh),
                "elements": sum(p.numel() for p in wide.model.parameters()) - sum(p.numel() for p in true.parameters()),
            }
    return found


def odd(variant: str, tp_size: int) -> TrainConfig:
    model = {"hidden_size": 16, "num_layers": 1, "ffn_hidden_size": 6_826, "vocab_size": 50_257}
    model |= {"num_kv_heads": 4, "partial_rotary_factor": 0.5} if variant == "stablelm" else {}
    return tiny_configs.make_config(variant, parallel={"tp_size": tp_size}, model=model)


def both(steppers: list[StepContext], step: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of one step, clipped and decayed, of each."""
    rows = tiny_configs.global_batch(step, global_batch_size=2, seq_len=16, vocab_size=50_257)
    return [steps.step(stepper, step, rows) for stepper in steppers]


def differing(wide: Engine, narrow: Engine, true: UnpaddedModel, mesh: Mesh) -> list[str]:
    """Weights, masters and moments whose true part is not the same bits."""
    without = {name.replace("/", "."): tensor for name, (_, tensor) in local_tensors(narrow).items()}
    names = {name: name.rsplit(" of ")[-1] for name in without}
    found = local_tensors(wide)
    assert found.keys() == without.keys()
    parts = {name: true.unpadded_part(names[name], found[name][1], mesh) for name in found}
    return [name for name in parts if not torch.equal(parts[name].reshape(-1), without[name])]


def local_tensors(engine: Engine) -> dict[str, tuple[TensorSharding, Tensor]]:
    """Weights, masters and moments of this rank, each as its parameter's flat box (dp_size is 1)."""
    parameters = dict(engine.model.named_parameters())
    found = {name: (p.sharding, p.detach().reshape(-1).clone()) for name, p in parameters.items()}
    for fragment in engine.optimizer_fragments():
        for kind, tensor in {"master": fragment.master, **fragment.moments}.items():
            assert tensor.numel() == parameters[fragment.name].numel()
            found[f"{kind} of {fragment.name}"] = parameters[fragment.name].sharding, tensor.clone()
    return found


def gathered(engine: Engine) -> dict[str, Tensor]:
    return {
        name: joined(shard, ranks.all_gather_objects(flat)) for name, (shard, flat) in local_tensors(engine).items()
    }


def largest_padding(engine: Engine, mesh: Mesh) -> dict[str, tuple[int, float]]:
    """How many elements of each tensor are padding on this rank, and the largest of them."""
    found = {}
    for name, (shard, flat) in local_tensors(engine).items():
        true = slice_local(shard, torch.ones(shard.global_shape), mesh.tp_rank, mesh.tp_size).reshape(-1).bool()
        outside = flat[~true]
        found[name] = outside.numel(), float(outside.abs().max()) if outside.numel() else 0.0
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("padding")


@pytest.fixture(scope="module")
def trained(folder) -> list[dict]:
    """`train_all` by rank."""
    return ranks.run(train_all, 2, folder, folder)


@pytest.fixture(scope="module")
def trained_odd(tmp_path_factory) -> dict[int, list[dict]]:
    """`train_odd` by tp_size and rank."""
    folder = tmp_path_factory.mktemp("odd")
    return {tp_size: ranks.run(train_odd, tp_size, folder, tp_size) for tp_size in (2, 4)}


@every_variant
@pytest.mark.parametrize("tp_size", [2, 4])
def test_fifty_steps_with_and_without_padding_are_the_same_bits(trained_odd, tp_size, variant):
    """Losses, gradient norms, weights, masters and moments, with ffn_hidden_size 6,826 and a vocabulary of 50,257."""
    for rank in trained_odd[tp_size]:
        found = rank[variant]
        assert found["steps"] == []
        assert found["tensors"] == []
        assert len(set(found["norms"])) == LONG_STEPS
        assert max(found["norms"]) > 1.0  # so it was clipped
        assert {largest for _, largest in found["padding"].values()} == {0.0}
    assert trained_odd[tp_size][-1][variant]["elements"] > 0


@every_variant
def test_padding_stays_zero_in_weights_and_moments(trained, variant):
    second = trained[1][variant]["padding"]
    padded = {name for name, (count, _) in second.items() if count}
    of_ffn = [f"layers.0.ffn.{name}" for name in ("gate_up.weight", "down.weight")]
    expected = ["embedding.weight", *of_ffn, *(["head.weight"] if variant == "stablelm" else [])]
    for name in expected:
        assert {name, f"master of {name}", f"exp_avg of {name}", f"exp_avg_sq of {name}"} <= padded
    for rank in trained:
        assert {largest for _, largest in rank[variant]["padding"].values()} == {0.0}


@every_variant
def test_the_run_beside_it_has_no_padding(trained, variant):
    """Else the comparisons below would say nothing."""
    assert all(count == 0 for rank in trained for count, _ in rank[f"{variant}/unpadded"]["padding"].values())


@every_variant
def test_initial_values_are_the_same_bits(trained, variant):
    with_padding, without = (trained[0][name]["initial"] for name in (variant, f"{variant}/unpadded"))
    assert with_padding.keys() == without.keys()
    assert all(torch.equal(with_padding[name], without[name]) for name in without)


@every_variant
def test_training_goes_the_same_way(trained, variant):
    with_padding, without = trained[0][variant], trained[0][f"{variant}/unpadded"]
    assert with_padding["norms"] == pytest.approx(without["norms"], rel=1e-6)
    for name, expected in without["trained"].items():
        # The second moment is a square: twice the relative error.
        limit = 2e-6 if name.startswith("exp_avg_sq") else 1e-6
        error = float((with_padding["trained"][name] - expected).norm() / expected.norm())
        assert error <= limit, f"{name}: relative error {error:.1e}"


@every_variant
def test_a_checkpoint_holds_true_sizes(trained, folder, variant):
    """The same tensors come out of it one by one, and in a layout that pads nothing."""
    snapshot, wanted = open_checkpoint(folder / variant), trained[0][variant]["trained"]
    model, _ = snapshot.model_configs()
    for name, shape in reference_module(model).shapes(model).items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensor = snapshot.read_tensor(kind, name)
            assert tuple(tensor.shape) == shape
            assert torch.equal(tensor, wanted[f"{kind} of {name}"])
    reloaded = trained[0][f"{variant}/reloaded"]["trained"]
    assert reloaded.keys() == wanted.keys()
    assert all(torch.equal(reloaded[name], wanted[name]) for name in wanted)


@every_variant
def test_an_export_holds_true_sizes(trained, folder, variant):
    snapshot = open_checkpoint(folder / variant)
    model, mup = snapshot.model_configs()
    out = folder / f"{variant}-export"
    export_folder(snapshot.read_weight, model, mup, out, tokenizer=None, max_seq_len=32, dtype=torch.float32)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 500
    with safe_open(out / WEIGHTS_FILE, framework="pt") as file:
        found = {size for name in file.keys() for size in file.get_slice(name).get_shape()}  # noqa: SIM118
    assert found >= {500, model.ffn_hidden_size}
    assert not found & {256, 512}
    again, _, read = convert.open_folder(out)
    assert replace(again, init_truncation_sigmas=model.init_truncation_sigmas) == model
    assert torch.equal(read("embedding.weight"), trained[0][variant]["trained"]["embedding.weight"])
