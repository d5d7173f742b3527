"""Training that continues from an export in plain PyTorch makes the same updates as the trainer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.trainer import models
from tandem.trainer.checkpoint.hf import btlm
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.tensor_conversion import to_hf_tensor
from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.config import MupConfig
from tandem.trainer.distributed.mesh import mesh_context
from tandem.trainer.models import param_groups
from tandem.trainer.models.mup import parameter_rules
from tests import tiny_configs
from tests.promises.test_hf import loaded
from tests.reference.offline import offline
from tests.reference.variants import VARIANTS, random_tokens, reference_module
from tests.sharded import joined

__all__ = ["offline"]

LR = 0.01
MODELS = {
    "tied": VARIANTS["btlm_mup"],
    "untied": (VARIANTS["btlm_untied"][0], MupConfig(16, 10.0, 1.5)),
    "without muP": VARIANTS["btlm_untied"],
}
every_model = pytest.mark.parametrize("name", MODELS)


def exported(name: str, out: Path) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """Return weights, and their export as transformers loads it."""
    model, mup = MODELS[name]
    tensors = reference_module(model).random_tensors(model, seed=3)
    export_folder(tensors.__getitem__, model, mup, out, tokenizer=None, max_seq_len=64, dtype=torch.float32)
    return tensors, loaded(out)


@every_model
def test_updates_with_the_exports_groups_are_the_trainers(name: str, tmp_path: Path) -> None:
    """Bitwise, for three updates, given the same gradients: those of the trainer's model. That gradients agree is shown
    elsewhere; AdamW would turn the rounding of the smallest ones into whole steps.
    """
    model, mup = MODELS[name]
    section = replace(tiny_configs.make_config("btlm").optim, weight_decay=0.1)
    tensors, theirs = exported(name, tmp_path / "out")
    with mesh_context(1) as mesh:
        ours = models.build_model(model, mup, mesh, dtype=torch.float32)
        load_weights(ours, tensors.__getitem__, mesh)
        adamw = param_groups.build_adamw(
            param_groups.build_param_groups(ours, parameter_rules(model, mup), section), section, mesh.device
        )
        for group in adamw.param_groups:
            group["lr"] = LR * group["lr_scale"]
        groups = theirs.get_mup_param_groups(LR, weight_decay=section.weight_decay)
        exports_adamw = torch.optim.AdamW(groups, betas=(section.beta1, section.beta2), eps=section.eps)
        named, found = dict(ours.named_parameters()), dict(theirs.named_parameters())
        for step in range(3):
            batch = random_tokens(model, seq_len=21, seed=step)
            ours(batch[:, :-1], batch[:, 1:], torch.zeros_like(batch[:, 1:]).int()).mean().backward()
            for row in btlm.tensor_mappings(model):
                for piece in row.hf_tensors:
                    gradient = joined(named[row.name].sharding, [named[row.name].grad])
                    found[piece.hf_name].grad = to_hf_tensor(row, piece, gradient).contiguous()
            for optimizer in (adamw, exports_adamw):
                optimizer.step()
            ours.zero_grad()
        for row in btlm.tensor_mappings(model):
            whole = joined(named[row.name].sharding, [named[row.name].detach()])
            assert not torch.equal(whole, tensors[row.name]), row.name
            assert all(
                torch.equal(found[piece.hf_name], to_hf_tensor(row, piece, whole)) for piece in row.hf_tensors
            ), row.name


@every_model
def test_every_parameter_is_in_one_group_with_the_published_rate_and_decay(name: str, tmp_path: Path) -> None:
    """The slopes are in no group, because they are frozen."""
    model, mup = MODELS[name]
    _, theirs = exported(name, tmp_path / "out")
    groups = theirs.get_mup_param_groups(LR, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    found = {names[id(each)]: (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    scale = mup.base_hidden_size / model.hidden_size if mup else 1.0
    for each, settings in found.items():
        if each.endswith("bias") or ".ln_" in each:
            assert settings == (LR, 0.0), each
        elif each in ("transformer.wte.weight", "lm_head.weight"):
            assert settings == (LR, 0.1), each
        else:
            assert settings == (pytest.approx(LR * scale), 0.1), each
    assert theirs.get_mup_param_groups(LR)[0]["weight_decay"] == 0.0
