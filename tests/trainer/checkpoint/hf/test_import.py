"""A Hugging Face folder that says two things, or one that we do not know, is refused; what other tools write is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.trainer.__main__ import main
from tandem.trainer.checkpoint.hf import config_fields, convert, description
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE
from tandem.trainer.checkpoint.hf.weight_files import PICKLE_FILE, PICKLE_INDEX_FILE
from tandem.trainer.config import MupConfig, UserError
from tests.promises.test_hf import export
from tests.reference.variants import VARIANTS, reference_module

BTLM, STABLE = "btlm_mup", "stablelm_12b"
EMBEDDING = "transformer.wte.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for variant in (BTLM, STABLE, "stablelm_1_6b", "btlm_fractional"):
        export(variant, root / variant)
    export(STABLE, root / "shards", shard_bytes=30_000)
    return root


@pytest.fixture
def copied(sources, tmp_path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(sources / name, tmp_path / name)


def edit(folder: Path, file: str = "config.json", **fields: object) -> None:
    """Change fields of a JSON file, which is made if there is none. A field with the value "drop" is removed."""
    path = folder / file
    tree = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in tree.items() if value != "drop"}))


def held(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): tensor for name, tensor in held(folder).items()}, folder / WEIGHTS_FILE)


def replace(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(held(folder) | {name: tensor}, folder / WEIGHTS_FILE)


def to_pickle(folder: Path, *, keep: bool = False, **options: object) -> Path:
    torch.save(held(folder), folder / PICKLE_FILE, **options)
    if not keep:
        (folder / WEIGHTS_FILE).unlink()
    return folder / PICKLE_FILE


def refusal(folder: Path) -> str:
    """The one line with which an import, or reading a tensor of it, is refused."""
    with pytest.raises(UserError) as caught:
        convert.open_folder(folder)[2]("embedding.weight")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- config.json


@pytest.mark.parametrize(
    ("variant", "fields", "parts"),
    [
        (
            STABLE,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling.type is 'linear'", "rope_parameters.rope_type is 'default'"],
        ),
        (
            STABLE,
            {"rope_parameters": "drop", "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling.type is not default"],
        ),
        (STABLE, {"rope_parameters": "drop", "rope_scaling": {"factor": 2.0}}, ["rope_scaling.factor is not 1.0"]),
        (
            STABLE,
            {"rope_parameters": "drop", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
            ["rope_type is not default"],
        ),
        (STABLE, {"rope_theta": 20_000.0}, ["rope_parameters.rope_theta is 500.0", "rope_theta is 20000.0"]),
        (STABLE, {"rope_pct": 0.5}, ["rope_pct is 0.5", "partial_rotary_factor is 0.25"]),
        (STABLE, {"rope_scaling": "linear"}, ["rope_scaling: 'linear' is not a mapping"]),
        (
            STABLE,
            {"rope_parameters": {"full_attention": {"rope_theta": 500.0}}},
            [
                "rope_parameters.full_attention is {'rope_theta': 500.0}, but only one set of rotary fields for all layers",
                "rope_parameters.rope_type, rope_parameters.rope_theta, rope_parameters.partial_rotary_factor",
            ],
        ),
        (
            STABLE,
            {"rope_parameters": {"rope_theta": "wide"}, "rope_theta": "drop"},
            ["rope_parameters.rope_theta: 'wide'"],
        ),
        (STABLE, {"rope_parameters": {"beta": 1}}, ["rope_parameters.beta: 1 is given, but there is no such field"]),
        (
            STABLE,
            {"rope_parameters": "drop", "partial_rotary_factor": "drop", "rotary_pct": 0.2},
            ["rotary_pct 0.2 rotates 3 of 16"],
        ),
        (
            STABLE,
            {"rope_parameters": "drop", "partial_rotary_factor": "drop", "rope_pct": 2},
            ["rope_pct: 2 is not a finite"],
        ),
        (STABLE, {"norm_eps": "small", "layer_norm_eps": "drop"}, ["config.json: norm_eps: 'small' is of type str"]),
        (STABLE, {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types has 'sliding_attention'"]),
        (STABLE, {"layer_types": "full_attention"}, ["layer_types has 'full_attention'"]),
        (STABLE, {"layer_types": ["full_attention"] * 9}, ["layer_types has 9 entries, but num_hidden_layers is 2"]),
        (
            STABLE,
            {"text_config": {"hidden_size": 96}},
            ["text_config is {'hidden_size': 96}, but only {} is supported"],
        ),
        (STABLE, {"seq_length": 65}, ["seq_length is 65, but max_position_embeddings is 64"]),
        (STABLE, {"n_layer": 3}, ["n_layer is 3, but num_hidden_layers is 2"]),
        (
            STABLE,
            {"n_positions": 64, "max_position_embeddings": "drop"},
            ["n_positions is 64, a field that is not known"],
        ),
        (STABLE, {"num_attention_heads": 7}, ["hidden_size is 96, which is not a multiple of num_attention_heads 7"]),
        (STABLE, {"num_key_value_heads": 4}, ["num_attention_heads is 6", "a multiple of num_key_value_heads 4"]),
        (STABLE, {"aliases": {"hidden_size": "x"}}, ["aliases is {'hidden_size': 'x'}, a field that is not known"]),
        (STABLE, {"tandem": {"init_truncation_sigmas": -1.0}}, ["tandem.init_truncation_sigmas: -1.0"]),
        (BTLM, {"num_hidden_layers": "two", "n_layer": "drop"}, ["num_hidden_layers: 'two' is of type str"]),
        (BTLM, {"num_attention_heads": 5, "n_head": "drop"}, ["n_embd is 48", "a multiple of num_attention_heads 5"]),
        (BTLM, {"intermediate_size": 55, "n_inner": "drop"}, ["c_fc2.weight has shape", "(intermediate_size, n_embd)"]),
        (
            BTLM,
            {"n_positions": "drop", "n_ctx": 64, "max_position_embeddings": 65},
            ["n_ctx is 64, but max_position_emb"],
        ),
        (BTLM, {"num_key_value_heads": 2}, ["num_key_value_heads is 2, but n_head is"]),
        (STABLE, {"rotary_scaling_factor": 2.0}, ["rotary_scaling_factor is 2.0", "only 1.0"]),
        (STABLE, {"norm_eps": 1e-5}, ["norm_eps is 1e-05", "layer_norm_eps is 0.0003"]),
        (
            STABLE,
            {"num_key_value_heads": 3},
            ["k_proj.weight has shape (32, 96)", "requires (48, 96)", "num_key_value_heads"],
        ),
        (STABLE, {"vocab_size": 102}, ["embed_tokens.weight has shape (101, 96)", "requires (102, 96)", "vocab_size"]),
        (
            STABLE,
            {"tie_word_embeddings": True},
            ["tie_word_embeddings in config.json is true", "lm_head.weight differs"],
        ),
        (STABLE, {"torch_dtype": "float16"}, ["torch_dtype is 'float16'", "dtype is 'float32'"]),
        (STABLE, {"architectures": ["LlamaForCausalLM"]}, ["'LlamaForCausalLM'", "model_type is 'stablelm'"]),
        (STABLE, {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config is 'gptq'"]),
        (STABLE, {"pruned_heads": {"0": [1]}}, ["pruned_heads is {'0': [1]}"]),
        (STABLE, {"head_dim": 32}, ["head_dim is 32", "96 / num_attention_heads 6 is 16"]),
        (STABLE, {"hidden_dropout": 0.1}, ["hidden_dropout is 0.1, but only 0.0"]),
        (STABLE, {"logit_softcap": 30.0}, ["logit_softcap is 30.0", "not known to have no effect", "remove it"]),
        (STABLE, {"sliding_window": 4096}, ["sliding_window is 4096"]),
        (STABLE, {"layer_norm_eps": -1e-5}, ["layer_norm_eps: -1e-05 is not a finite number above 0"]),
        (STABLE, {"hidden_size": 96.0}, ["hidden_size: 96.0 is of type float"]),
        (BTLM, {"model_type": "stablelm"}, ["'BTLMLMHeadModel', but model_type is 'stablelm'"]),
        (STABLE, {"hidden_size": 10**30}, ["hidden_size: 1000000000000000000000000000000 does not fit"]),
        (STABLE, {"model_type": ["stablelm"]}, ["model_type ['stablelm'] is not one of"]),
        (BTLM, {"mup_width_scale": 1e308}, ["mup_width_scale: 1e+308 is not a finite number above 0"]),
        (STABLE, {"use_qkv_bias": "yes"}, ["use_qkv_bias: 'yes' is of type str"]),
        (
            STABLE,
            {"partial_rotary_factor": 0.2, "rope_parameters": "drop"},
            ["partial_rotary_factor 0.2 rotates 3 of 16"],
        ),
        (BTLM, {"hidden_size": 64}, ["hidden_size is 64", "n_embd is 48"]),
        (BTLM, {"intermediate_size": 55}, ["intermediate_size is 55", "n_inner is 54"]),
        (
            BTLM,
            {"n_inner": "drop"},
            ["c_fc2.weight has shape (48, 54)", "(48, 192) (n_inner"],
        ),  # 4 * n_embd, as in GPT-2
        (STABLE, {"rotary_scaling_factor": True}, ["rotary_scaling_factor is True, but only 1.0"]),
        (BTLM, {"add_cross_attention": True}, ["add_cross_attention is True"]),
        (BTLM, {"mup_width_scale": 0}, ["mup_width_scale: 0 is not a finite number above 0"]),
        (
            BTLM,
            {"alibi_scaling": {"type": "linear", "train_seq_len": 4096}},
            ["train_seq_len is 4096", "n_positions", "only 64"],
        ),
        (BTLM, {"alibi_scaling": {"type": "linear", "factor": 2.0, "train_seq_len": 32}}, ["exactly one"]),
    ],
)
def test_two_statements_or_an_unknown_one_are_refused(copied, variant, fields, parts):
    folder = copied(variant)
    edit(folder, **fields)
    message = refusal(folder)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        (STABLE, {"rope_scaling": {"type": "default"}, "rope_theta": 500, "rope_pct": 0.25, "head_dim": 16}),
        (STABLE, {"torch_dtype": "torch.float32", "dtype": "drop", "rope_scaling": None, "quantization_config": None}),
        (STABLE, dict.fromkeys((key for keys in config_fields.KEYS_WITHOUT_EFFECT.values() for key in keys), "any")),
        (
            STABLE,
            {
                "attention_dropout": 0,
                "attention_bias": False,
                "is_causal": True,
                "quantization_config": {},
                "sliding_window": None,
                "bos_token_id": 0,
                "eos_token_id": [0, 1],
                "pad_token_id": -1,
            },
        ),
        (BTLM, {"hidden_size": 48, "n_ctx": 64, "architectures": None, "is_decoder": True, "id2label": {"0": "x"}}),
        (BTLM, {"seq_length": 64, "num_layers": 2, "text_config": {}, "layer_types": ["full_attention"] * 2}),
        (
            STABLE,
            {
                "layer_types": ["full_attention"] * 2,
                "text_config": {},
                "seq_length": 64,
                "n_positions": 64,
                "n_embd": 96,
                "num_layers": 2,
            },
        ),
    ],
)
def test_what_states_the_same_twice_or_has_no_effect_is_read(copied, variant, fields):
    folder = copied(variant)
    edit(folder, **fields)
    assert convert.open_folder(folder)[:2] == VARIANTS[variant]


def test_the_early_form_of_stablelm_is_read(copied):
    """Field names, model_type and class of the first revisions, with tables of rotary positions among the tensors."""
    folder, (wanted, _) = copied("stablelm_1_6b"), VARIANTS["stablelm_1_6b"]
    fields = json.loads((folder / "config.json").read_text())
    early = {
        "model_type": "stablelm_epoch", "architectures": ["StableLMEpochForCausalLM"], "rope_pct": 0.5,
        "norm_eps": wanted.norm_eps, "rope_theta": int(wanted.rotary_base), "rotary_scaling_factor": 1.0,
        "auto_map": {"AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig"},
    }  # fmt: skip
    later = ("rope_parameters", "layer_norm_eps", "partial_rotary_factor", "qk_layernorm", "use_parallel_residual")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in later} | early))
    replace(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(3))
    model, mup, read = convert.open_folder(folder)
    assert (model, mup) == (wanted, None)
    tensors = reference_module(wanted).random_tensors(wanted, seed=3)
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())
    assert description.read_text_settings(folder)[1] == 64


def test_a_width_scale_without_whole_inverse_and_unscaled_scores_are_carried_exactly(copied, tmp_path):
    folder = copied("btlm_fractional")
    edit(folder, mup_width_scale=0.3, mup_scale_qk_dot_by_d=False)
    model, mup, _ = convert.open_folder(folder)
    assert mup == MupConfig(0.3 * model.hidden_size, 6.5, 1.75, scale_qk_dot_by_d=False)
    assert main(["import-hf", str(folder), str(tmp_path / "in")]) == 0
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["mup_width_scale"], fields["mup_scale_qk_dot_by_d"]) == (0.3, False)
    edit(folder, mup_width_scale=0.1)
    assert convert.open_folder(folder)[1] == MupConfig(4, 6.5, 1.75, scale_qk_dot_by_d=False)


# --- weights


def test_a_pickle_is_read_like_safetensors(copied):
    """Published layout: one file with tied head, slopes and masks, in bf16 and fp64, and with parts of one storage."""
    folder = copied(BTLM)
    tensors = held(folder)
    changed = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items() if "mlp" in name}
    changed |= {name: tensor.double() for name, tensor in tensors.items() if "c_attn" in name}
    changed["transformer.ln_f.bias"] = torch.nn.Parameter(torch.stack([tensors["transformer.ln_f.bias"]] * 2).t()[:, 0])
    tensors |= changed
    extra = {"lm_head.weight": tensors[EMBEDDING], "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).bool()}
    extra["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(tensors | extra, folder / PICKLE_FILE)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    safe = convert.open_folder(folder)[2]  # compares both
    names = reference_module(VARIANTS[BTLM][0]).shapes(VARIANTS[BTLM][0])
    expected = {name: safe(name) for name in names}
    (folder / WEIGHTS_FILE).unlink()
    model, mup, read = convert.open_folder(folder)
    assert (model, mup) == VARIANTS[BTLM]
    assert all(
        torch.equal(read(name), tensor) and read(name).dtype == tensor.dtype for name, tensor in expected.items()
    )


def shard_pickles(folder: Path) -> Path:
    names = sorted(held(folder))
    parts = [names[::2], names[1::2]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: held(folder)[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in held(folder).values())
    edit(folder, PICKLE_INDEX_FILE, metadata={"total_size": float(total)}, weight_map=weight_map)
    (folder / WEIGHTS_FILE).unlink()
    return folder


def test_sharded_pickles_are_read(copied):
    folder = shard_pickles(copied(BTLM))
    tensors = reference_module(VARIANTS[BTLM][0]).random_tensors(VARIANTS[BTLM][0], seed=3)
    read = convert.open_folder(folder)[2]
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("run by a pickle",)


def append_to(path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(path) | {name: tensor}, path)


def nan_in(folder: Path, value: float, dtype: torch.dtype = torch.float32) -> None:
    tensor = held(folder)[EMBEDDING].to(dtype)
    tensor[3, 5] = value
    replace(folder, EMBEDDING, tensor)


def shard_names(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def list_also(folder: Path, name: str) -> None:
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    edit(folder, INDEX_FILE, weight_map=weight_map | {name: shard_names(folder)[0].name})


def move(folder: Path, source: str, target: str) -> None:
    (folder / source).rename(folder / target)


@pytest.mark.parametrize(
    ("source", "damage", "parts"),
    [
        (BTLM, lambda f: nan_in(f, float("nan")), ["transformer.wte.weight contains nan"]),
        (BTLM, lambda f: nan_in(f, float("-inf"), torch.bfloat16), ["transformer.wte.weight contains inf"]),
        (BTLM, lambda f: nan_in(f, 1e300, torch.float64), ["transformer.wte.weight contains 1e+300"]),
        (BTLM, lambda f: (nan_in(f, float("nan")), to_pickle(f)), [PICKLE_FILE, "transformer.wte.weight contains nan"]),
        (
            BTLM,
            lambda f: (to_pickle(f, keep=True), nan_in(f, 9.0)),
            ["wte.weight differs between model.safetensors and pytorch"],
        ),
        (
            BTLM,
            lambda f: to_pickle(f, _use_new_zipfile_serialization=False),
            ["since PyTorch 1.6", "save the weights again"],
        ),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save({"a": Foreign()}, f / PICKLE_FILE)),
            ["posix.mkdir", "no code from a file"],
        ),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save(torch.nn.Linear(1, 1), f / PICKLE_FILE)),
            ["torch.nn.modules.linear.Linear"],
        ),
        (BTLM, lambda f: (to_pickle(f), torch.save({"state_dict": held}, f / PICKLE_FILE)), ["only tensors"]),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save({"model": {}}, f / PICKLE_FILE)),
            ["'model' is a dict instead of a tensor"],
        ),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save([torch.ones(1)], f / PICKLE_FILE)),
            ["a list instead of tensors by name"],
        ),
        (BTLM, lambda f: to_pickle(f).write_bytes(pickle.dumps(Foreign())), ["is not an archive of torch.save"]),
        (BTLM, lambda f: to_pickle(f).write_bytes(b""), ["is not an archive of torch.save"]),
        (BTLM, lambda f: os.truncate(to_pickle(f), 5000), ["cannot be read", "copy the file again"]),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save({"x": torch.ones(1).expand(1 << 30)}, f / PICKLE_FILE)),
            ["more values"],
        ),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save({"x": torch.ones(2).to_sparse()}, f / PICKLE_FILE)),
            ["not a plain tensor"],
        ),
        (
            BTLM,
            lambda f: (to_pickle(f), torch.save({"x": torch.ones(2, device="meta")}, f / PICKLE_FILE)),
            ["not a plain"],
        ),
        (
            BTLM,
            lambda f: replace(f, "transformer.wpe.weight", torch.ones(2)),
            ["wpe.weight is not a tensor of the model"],
        ),
        (BTLM, lambda f: edit(f, "adapter_config.json", peft_type="LORA"), ["adapter_config.json", "merge_and_unload"]),
        (BTLM, lambda f: replace(f, "transformer.h.0.attn.c_attn.lora_A.weight", torch.ones(2)), ["merge_and_unload"]),
        (BTLM, lambda f: rename(f, lambda name: name.replace("ln_f", "module.ln_f")), ["is missing"]),
        (
            BTLM,
            lambda f: replace(f, "transformer.h.0._orig_mod.x", torch.ones(2)),
            ["without the wrapper", "'_orig_mod'"],
        ),
        (
            BTLM,
            lambda f: rename(f, lambda name: name if "ln_f" in name else "module." + name),
            ["prefix 'module.'", "ln_f", "lacks"],
        ),
        (BTLM, lambda f: move(f, WEIGHTS_FILE, "model.pth"), ["has neither", "found: model.pth"]),
        (
            "shards",
            lambda f: shutil.copyfile(shard_names(f)[0], f / WEIGHTS_FILE),
            ["contains model.safetensors", INDEX_FILE],
        ),
        (
            "shards",
            lambda f: shutil.copyfile(shard_names(f)[0], f / "model-00099-of-00099.safetensors"),
            ["model-00099"],
        ),
        (
            "shards",
            lambda f: append_to(shard_names(f)[1], min(load_file(shard_names(f)[0])), torch.ones(2)),
            ["is in model-00001", "and in model-00002"],
        ),
        ("shards", lambda f: append_to(shard_names(f)[0], "x", torch.ones(2)), ["contains x", "does not list it"]),
        ("shards", lambda f: edit(f, INDEX_FILE, metadata={"total_size": 10}), ["total_size is 10, but", "bytes"]),
        (
            "shards",
            lambda f: edit(f, INDEX_FILE, weight_map={"x": "../x.safetensors"}),
            ["'../x.safetensors' is not the name"],
        ),
        ("shards", lambda f: edit(f, INDEX_FILE, weights=3), ["weights: 3 is given"]),
        ("shards", lambda f: list_also(f, "gone"), ["lists gone", "does not contain it"]),
    ],
)
def test_weights_that_are_not_safe_or_contradict_one_another_are_refused(
    copied, source, damage, parts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = copied(source)
    damage(folder)
    message = refusal(folder)
    assert [part for part in parts if part not in message] == [], message
    assert not (tmp_path / "run by a pickle").exists()


@pytest.mark.parametrize("variant", [BTLM, STABLE])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "model."])
def test_a_prefix_that_all_names_share_is_read(copied, variant, prefix):
    folder = copied(variant)
    rename(folder, lambda name: prefix + name)
    assert_same_weights(folder, variant)


@pytest.mark.parametrize("variant", [BTLM, STABLE])
def test_names_without_the_prefix_of_the_headed_class_are_read(copied, variant):
    folder = copied(variant)
    rename(folder, lambda name: name.removeprefix("transformer.").removeprefix("model."))
    assert_same_weights(folder, variant)


def assert_same_weights(folder: Path, variant: str) -> None:
    tensors = reference_module(VARIANTS[variant][0]).random_tensors(VARIANTS[variant][0], seed=3)
    model, mup, read = convert.open_folder(folder)
    assert (model, mup) == VARIANTS[variant]
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


def test_a_field_that_only_our_config_refuses_is_named_as_in_the_file(copied):
    for variant, name in ((STABLE, "num_hidden_layers"), (BTLM, "n_layer"), (BTLM, "num_hidden_layers")):
        folder = copied(variant)
        edit(folder, **dict.fromkeys(("n_layer",) if variant == BTLM else (), "drop") | {name: 2**40})
        message = refusal(folder)
        assert f"config.json: {name}: {2**40} is not a finite number" in message, message
        shutil.rmtree(folder)


def test_a_snapshot_of_the_hubs_cache_is_read(copied, tmp_path):
    """Its files are links to files that are named by hash, in another folder."""
    folder, blobs, snapshot = copied(STABLE), tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    for each in (blobs, snapshot):
        each.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    assert convert.open_folder(snapshot)[:2] == VARIANTS[STABLE]
    assert main(["import-hf", str(snapshot), str(tmp_path / "in")]) == 0
    assert not [path for path in (tmp_path / "in").rglob("*") if path.is_symlink()]
