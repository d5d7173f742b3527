"""Details of BTLM that are easy to get wrong, each tested separately against numbers computed here.

Sources: Cerebras modelzoo `params_btlm_2p7b_2k.yaml`, the released config.json and names of weights, and the model card.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from tandem.trainer import models
from tandem.trainer.checkpoint.hf import convert
from tandem.trainer.checkpoint.hf.export import export_folder
from tandem.trainer.checkpoint.hf.folder import WEIGHTS_FILE
from tandem.trainer.checkpoint.read import load_weights
from tandem.trainer.config import BTLMConfig, TrainConfig, load_config
from tandem.trainer.config.schedule import Timeline
from tandem.trainer.distributed.mesh import Mesh, mesh_context
from tandem.trainer.models import param_groups
from tandem.trainer.models.decoder import Decoder
from tandem.trainer.models.init import initial_value
from tandem.trainer.models.mup import parameter_rules
from tests import tiny_configs
from tests.reference.variants import reference_module

HEADS, HEAD_DIM = 2, 80
SLOPES = (2**-4, 2**-8)


@pytest.fixture(scope="module")
def shipped() -> TrainConfig:
    return load_config(Path(__file__).parents[3] / "configs" / "btlm-3b-8k.yaml")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with mesh_context(1) as mesh:
        yield mesh


def small(shipped: TrainConfig) -> TrainConfig:
    """The shipped model with one layer, two heads and a small vocabulary, but the same head_dim and muP multipliers."""
    sizes = {
        "hidden_size": HEADS * HEAD_DIM,
        "num_heads": HEADS,
        "num_layers": 1,
        "ffn_hidden_size": 54,
        "vocab_size": 500,
    }
    assert shipped.mup is not None
    base_hidden_size = HEADS * HEAD_DIM * shipped.mup.base_hidden_size // shipped.model.hidden_size
    return replace(
        shipped, model=replace(shipped.model, **sizes), mup=replace(shipped.mup, base_hidden_size=base_hidden_size)
    )


def decoder(config: TrainConfig, tensors: dict[str, Tensor], mesh: Mesh, dtype: torch.dtype = torch.float32) -> Decoder:
    built = models.build_model(config.model, config.mup, mesh, dtype=dtype)
    load_weights(built, tensors.__getitem__, mesh)
    return built


def some(config: TrainConfig) -> dict[str, Tensor]:
    found: dict[str, Tensor] = reference_module(config.model).random_tensors(config.model, seed=5)
    return found


# --- attention


def attended(config: TrainConfig, qkv: Tensor, x: Tensor, mesh: Mesh) -> Tensor:
    """Return the output of the layer's attention for x [seq, width], as [seq, heads, head_dim].

    The output matrix is the identity. `qkv` [heads, 3, head_dim, width] are the query, key and value matrices of each head.
    """
    tensors = some(config) | {
        "layers.0.attention.qkv.weight": qkv.flatten(0, 2),
        "layers.0.attention.qkv.bias": torch.zeros(3 * config.model.hidden_size),
        "layers.0.attention.out.weight": torch.eye(config.model.hidden_size),
    }
    built = decoder(config, tensors, mesh, x.dtype)
    context = built.layer_context(torch.zeros(1, len(x), dtype=torch.int32), None)
    with torch.no_grad():
        return built.layers[0].attention(x[:, None], context)[:, 0].view(len(x), HEADS, HEAD_DIM).double()


def biases(length: int) -> Tensor:
    """Return the biases [heads, query, key] in fp64: minus slope times distance, or minus infinity for later keys."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    bias = -torch.tensor(SLOPES, dtype=torch.float64)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)


def reads_itself() -> Tensor:
    """Queries and keys are zero, and the values of all heads together are x."""
    qkv = torch.zeros(HEADS, 3, HEAD_DIM, HEADS * HEAD_DIM)
    qkv[:, 2] = torch.eye(HEADS * HEAD_DIM).view(HEADS, HEAD_DIM, -1)
    return qkv


def test_scores_are_divided_by_the_size_of_a_head_and_not_by_its_root(shipped, mesh, generator):
    qkv = torch.randn(HEADS, 3, HEAD_DIM, HEADS * HEAD_DIM, generator=generator) / 4
    x = torch.randn(40, HEADS * HEAD_DIM, generator=generator)
    query, key, value = torch.einsum("hcdw,sw->chsd", qkv.double(), x.double())
    exact = (query @ key.transpose(1, 2) / 80 + biases(40)).softmax(-1) @ value
    assert (attended(small(shipped), qkv, x, mesh) - exact.transpose(0, 1)).abs().max() <= 1e-5 * exact.std()


def test_the_bias_is_minus_slope_times_distance_and_not_scaled_with_the_scores(shipped, mesh, generator):
    """With zero queries, only the bias determines the weights."""
    x = torch.randn(100, HEADS * HEAD_DIM, generator=generator)
    exact = biases(100).softmax(-1) @ x.double().view(100, HEADS, HEAD_DIM).transpose(0, 1)
    assert (attended(small(shipped), reads_itself(), x, mesh) - exact.transpose(0, 1)).abs().max() <= 1e-5


def test_the_bias_is_fp32_in_a_bf16_model(shipped, mesh):
    """Values are 1 and -1 at distances that bf16 cannot distinguish, because above 256 it has only even numbers."""
    distance = torch.arange(600).flip(0)
    far = (distance >= 256) & (distance < 512)
    ones = torch.where(distance % 4 == 0, 1.0, torch.where(distance % 4 == 1, -1.0, 0.0)) * far
    x = ones[:, None].expand(-1, HEADS * HEAD_DIM).contiguous()
    found = attended(small(shipped), reads_itself(), x.bfloat16(), mesh)[-1, 1, 0]
    exact = biases(600)[1, -1].softmax(-1) @ ones.double()
    rounded = biases(600)[1, -1].bfloat16().double().softmax(-1) @ ones.double()
    assert abs(rounded / exact) < 0.1
    assert float(found / exact) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (2, SLOPES),
        (8, [2.0 ** -(index + 1) for index in range(8)]),
        (32, [2 ** (-0.25 * (index + 1)) for index in range(32)]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [*[2.0 ** -(index + 1) for index in range(8)], 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_slopes_of_any_number_of_heads_on_any_rank(pretended, heads, slopes, tp_size):
    """The slopes are geometric. Heads beyond a power of two use every other slope of the next. Each rank has its own heads'."""
    config = tiny_configs.make_config("btlm", model={"num_heads": heads, "hidden_size": 8 * heads})
    found = []
    for tp_rank in range(tp_size):
        with pretended(tp_rank, tp_size) as mesh:
            built = models.build_model(config.model, config.mup, mesh, dtype=torch.bfloat16)
            found.append(built.layer_context(torch.zeros(1, 4, dtype=torch.int32), None).slopes)
            assert found[-1].dtype == torch.float32
    assert torch.cat(found).tolist() == pytest.approx(list(slopes), rel=1e-7)


# --- feed-forward network and the order of what is stored


def test_c_fc_is_the_value_and_c_fc2_the_gate(shipped, mesh, tmp_path, generator):
    """Load a folder with the published names, whose matrices are stored as [in, out]."""
    config = small(shipped)
    folder, width, ffn_hidden_size = tmp_path / "out", config.model.hidden_size, config.model.ffn_hidden_size
    tensors = some(config)
    export_folder(
        tensors.__getitem__, config.model, config.mup, folder, tokenizer=None, max_seq_len=64, dtype=torch.float32
    )
    stored = {
        name.removeprefix("transformer.h.0.mlp."): value for name, value in load_file(folder / WEIGHTS_FILE).items()
    }
    assert stored["c_fc.weight"].shape == stored["c_fc2.weight"].shape == (width, ffn_hidden_size)
    assert stored["c_proj.weight"].shape == (ffn_hidden_size, width)
    x = torch.randn(5, 1, width, generator=generator)
    value, gate = (x @ stored[f"{name}.weight"] + stored[f"{name}.bias"] for name in ("c_fc", "c_fc2"))
    expected = (value * silu(gate)) @ stored["c_proj.weight"]
    _, _, read = convert.open_folder(folder)
    built = models.build_model(config.model, config.mup, mesh, dtype=torch.float32)
    load_weights(built, read, mesh)
    torch.testing.assert_close(built.layers[0].ffn(x), expected, rtol=1e-5, atol=1e-5)


def test_c_attn_holds_all_queries_then_all_keys_then_all_values_as_in_out(shipped, tmp_path, generator):
    config = small(shipped)
    folder, tensors = tmp_path / "out", some(config)
    export_folder(
        tensors.__getitem__, config.model, config.mup, folder, tokenizer=None, max_seq_len=64, dtype=torch.float32
    )
    stored = load_file(folder / WEIGHTS_FILE)
    x = torch.randn(config.model.hidden_size, generator=generator)
    theirs = x @ stored["transformer.h.0.attn.c_attn.weight"] + stored["transformer.h.0.attn.c_attn.bias"]
    ours = linear(x, tensors["layers.0.attention.qkv.weight"], tensors["layers.0.attention.qkv.bias"])
    by_head = ours.view(HEADS, 3, HEAD_DIM)
    torch.testing.assert_close(
        theirs, torch.cat([by_head[:, which].flatten() for which in range(3)]), rtol=1e-5, atol=1e-5
    )
    out = stored["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(out, tensors["layers.0.attention.out.weight"].t())


# --- multipliers


def test_logits_are_multiplied_by_0_222(shipped, mesh):
    """If the layers add nothing, only the final norm and the tied head remain."""
    config = small(shipped)
    silent = ("attention.out.weight", "attention.out.bias", "ffn.down.weight", "ffn.down.bias")
    tensors = some(config)
    tensors |= {f"layers.0.{name}": torch.zeros_like(tensors[f"layers.0.{name}"]) for name in silent}
    drawn = torch.randint(500, (1, 30), generator=torch.Generator().manual_seed(3))
    found = decoder(config, tensors, mesh).logits(drawn, torch.zeros_like(drawn).int())[0].double()
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    stream = exact["embedding.weight"][drawn[0]] * 14.6
    normal = layer_norm(stream, (160,), exact["final_norm.weight"], exact["final_norm.bias"], config.model.norm_eps)
    expected = linear(normal, exact["embedding.weight"]) * 0.222
    assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_embeddings_are_multiplied_by_14_6(shipped, mesh):
    """Look at the stream before the first layer, because that layer's norm would hide the factor."""
    config, found = small(shipped), []
    built = decoder(config, some(config), mesh)
    built.layers[0].register_forward_hook(lambda module, given, out: found.append(given[0]))
    drawn = torch.arange(500)[None]
    built.logits(drawn, torch.zeros_like(drawn).int())
    torch.testing.assert_close(found[0][:, 0], some(config)["embedding.weight"] * 14.6)


# --- initial values and the optimizer's groups


@pytest.mark.parametrize(
    ("role", "sigma"),
    [("embedding", 0.073), ("hidden", 0.073 / 10**0.5), ("residual_output", 0.073 / (10 * 2 * 32) ** 0.5)],
)
def test_initial_values_are_normals_cut_at_two_sigma(shipped, role, sigma):
    """They are not rescaled, so their standard deviation is 0.8796 sigma, as in the published run."""
    assert shipped.model.init_truncation_sigmas == 2.0
    rule = parameter_rules(shipped.model, shipped.mup)[role]
    values = initial_value("a", (500, 400), rule, seed=1, truncation_sigmas=shipped.model.init_truncation_sigmas)
    assert 1.99 * sigma < float(values.abs().max()) <= 2 * sigma * (1 + 1e-6)
    assert float(values.std()) == pytest.approx(0.8796 * sigma, rel=5 / (2 * values.numel()) ** 0.5)
    # A truncated normal has 72 % within one sigma, a uniform distribution 50 %.
    assert float((values.abs() < sigma).double().mean()) == pytest.approx(0.7152, abs=0.005)


def test_each_tensor_has_its_published_learning_rate_and_decay(shipped, mesh):
    """At the peak: 1.2e-3 for hidden matrices and 1.2e-2 for the rest. Only matrices and the embedding decay, by 0.1."""
    meta = torch.device("meta")
    with meta:
        model = models.build_model(shipped.model, shipped.mup, replace(mesh, device=meta), dtype=torch.bfloat16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups.build_param_groups(model, parameter_rules(shipped.model, shipped.mup), shipped.optim)
    lr = Timeline(shipped.schedule).lr_at(shipped.schedule.lr.warmup_steps)
    found = {
        names[id(parameter)]: (lr * group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == reference_module(shipped.model).shapes(shipped.model).keys()
    for name, settings in found.items():
        if "norm" in name or name.endswith("bias"):
            assert settings == (pytest.approx(1.2e-2), 0.0), name
        else:
            assert settings == (pytest.approx(1.2e-2 if name == "embedding.weight" else 1.2e-3), 0.1), name


def test_the_model_is_btlm(shipped):
    """The numbers above are valid only for the shipped config."""
    assert isinstance(shipped.model, BTLMConfig)
    assert (shipped.model.hidden_size, shipped.model.num_heads, shipped.model.head_dim) == (2_560, 32, 80)
