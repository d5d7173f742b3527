"""One layer of Stable LM 2 12B at its real width is transformers', on one rank and on the two of the published run.

Width 5,120, 32 heads of 160 over 8 key heads, ffn_hidden_size 13,824: where a wrong stride, a wrong group of key heads or a
share cut in the wrong place would show that small even sizes may hide. The vocabulary alone is small.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tandem.trainer.checkpoint.hf import description
from tandem.trainer.checkpoint.hf.tensor_conversion import default_tensors, from_hf_tensors, to_hf_tensor
from tandem.trainer.config import StableLMConfig, load_config
from tandem.trainer.distributed.layers import sharding_of
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.distributed.sharding import slice_local
from tandem.trainer.models import build_model
from tests import ranks
from tests.reference.variants import reference_module

LIMIT = 1e-5
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def model() -> StableLMConfig:
    """The shipped 12B with one layer and few words."""
    section = load_config(Path(__file__).parents[2] / "configs" / "stablelm-2-12b.yaml").model
    return StableLMConfig(**{**vars(section), "num_layers": 1, "vocab_size": 300, "document_masking": False})


def rows() -> tuple[Tensor, Tensor]:
    drawn = torch.randint(300, (2, 25), generator=torch.Generator().manual_seed(7))
    return drawn[:, :-1], drawn[:, 1:]


def of_transformers(file: Path) -> None:
    """Into the file go, by our names: weights, logits, loss, and the gradients that transformers finds."""
    from transformers import StableLmConfig, StableLmForCausalLM

    section = model()
    table = list(description.FAMILY_MODULES["stablelm"].tensor_mappings(section))
    given = StableLmConfig(**description.FAMILY_MODULES["stablelm"].to_hf_config(section, None, 4_096))
    with torch.device("meta"):
        theirs = StableLmForCausalLM(given)
    weights = reference_module(section).random_tensors(section, seed=5)
    pieces = {piece.hf_name: to_hf_tensor(row, piece, weights[row.name]) for row in table for piece in row.hf_tensors}
    pieces |= default_tensors(section)
    theirs.load_state_dict(pieces, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(given)
    for parameter in theirs.parameters():
        parameter.requires_grad_()
    read, targets = rows()
    logits = theirs(read).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {f"gradient of {row.name}": from_hf_tensors(row, gradients.__getitem__) for row in table}
    save_file({**weights, **found, "logits": logits.detach(), "loss": loss.detach()}, file)


def own(file: safe_open, name: str, parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    """This rank's part of the file's tensor, in the shape of the parameter; of a tensor without padding only that is read."""
    shard = sharding_of(parameter)
    if shard.sharded_dim is None or shard.padded_size != shard.global_shape[shard.sharded_dim]:
        return slice_local(shard, file.get_tensor(name), mesh.tp_rank, mesh.tp_size).reshape(parameter.shape)
    share = shard.padded_size // mesh.tp_size
    place = [slice(None)] * len(shard.global_shape)
    place[shard.sharded_dim] = slice(mesh.tp_rank * share, (mesh.tp_rank + 1) * share)
    return file.get_slice(name)[tuple(place)].reshape(parameter.shape)


def errors(file: Path, tp_size: int) -> dict[str, float]:
    """This rank's parts of ours against transformers': of logits over their range, of the rest over its norm."""
    read, targets = rows()
    with mesh_context(tp_size) as mesh, safe_open(file, framework="pt") as exact:
        ours = build_model(model(), None, mesh, dtype=torch.float32)
        parameters: dict[str, nn.Parameter] = dict(ours.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(own(exact, name, parameter, mesh))
        loss = ours(read, targets, torch.zeros_like(read).int()).mean()
        loss.backward()
        logits, theirs = ours.logits(read, torch.zeros_like(read).int()), exact.get_tensor("logits")
        found = {
            "logits": float((logits - theirs).abs().max() / (theirs.max() - theirs.min())),
            "loss": abs(float(loss.detach() - exact.get_tensor("loss"))) / float(loss.detach()),
        }
        for name, parameter in parameters.items():
            part = own(exact, f"gradient of {name}", parameter, mesh)
            found[name] = float((parameter.grad - part).norm() / part.norm())
        return found


def worst_of_ranks(file: Path, tp_size: int) -> dict[str, float]:
    by_rank = ranks.all_gather_objects(errors(file, tp_size))
    return {name: max(found[name] for found in by_rank) for name in by_rank[0]}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("width") / "transformers.safetensors"
    of_transformers(path)
    return path


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_layer_at_real_width_is_that_of_transformers(file, tp_size, tmp_path):
    alone = tp_size == 1
    found = errors(file, 1) if alone else ranks.run(worst_of_ranks, 2, tmp_path, file, 2)[0]
    assert found.keys() == {*reference_module(model()).shapes(model()), "logits", "loss"}
    assert {name: error for name, error in found.items() if error > LIMIT} == {}
