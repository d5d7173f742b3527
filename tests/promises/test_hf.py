"""transformers computes the model from an export, and an import of the export is the same model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from tandem.trainer.checkpoint.hf import btlm, convert, description
from tandem.trainer.checkpoint.hf.export import _build_hf_config, export_folder
from tandem.trainer.checkpoint.hf.folder import INDEX_FILE, WEIGHTS_FILE, read_json, write_json
from tandem.trainer.checkpoint.hf.tensor_conversion import default_tensors, to_hf_tensor
from tests.reference.offline import offline
from tests.reference.variants import EXPORTED_VARIANTS, VARIANTS, random_tokens, reference_module, to_fp64

__all__ = ["offline"]

NOISE = 4
"""Two fp32 evaluations differ from fp64 by about the same amount. This leaves room for another order of sums."""

every_variant = pytest.mark.parametrize("variant", EXPORTED_VARIANTS)


def export(variant: str, out: Path, **options) -> dict[str, Tensor]:
    model, mup = VARIANTS[variant]
    tensors = reference_module(model).random_tensors(model, seed=3)
    options = {"tokenizer": None, "max_seq_len": 64, "dtype": torch.float32} | options
    export_folder(tensors.__getitem__, model, mup, out, **options)
    return tensors


def loaded(folder: Path, **options) -> PreTrainedModel:
    options = {"trust_remote_code": True} | options
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


@every_variant
def test_logits_and_gradients_of_an_export_are_the_references(variant: str, tmp_path: Path) -> None:
    model, mup = VARIANTS[variant]
    tensors, batch = export(variant, tmp_path / "out"), random_tokens(model)

    def evaluate(given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        logits = reference_module(model).logits(leaves.__getitem__, model, mup, batch)
        logits.logsumexp(-1).mean().backward()
        return logits.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    exact, exact_gradients = evaluate(to_fp64(tensors))
    ours, our_gradients = evaluate(tensors)
    theirs = loaded(tmp_path / "out")
    logits = theirs(batch).logits
    logits.logsumexp(-1).mean().backward()

    assert (logits - exact).abs().max() <= NOISE * (ours - exact).abs().max()
    found = dict(theirs.named_parameters())
    ours_away, theirs_away = torch.zeros(2, dtype=torch.float64)
    for mapping in description.FAMILY_MODULES[model.family].tensor_mappings(model):
        ours_away += (our_gradients[mapping.name] - exact_gradients[mapping.name]).square().sum()
        for hf_tensor in mapping.hf_tensors:
            gradient = to_hf_tensor(mapping, hf_tensor, exact_gradients[mapping.name])
            theirs_away += (found[hf_tensor.hf_name].grad - gradient).square().sum()
    assert theirs_away.sqrt() <= NOISE * ours_away.sqrt()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("btlm")])
def test_shipped_btlm_is_the_reference_in_double_precision(variant: str, tmp_path: Path) -> None:
    """Find what fp32 noise can hide: 1e-12 is four digits above the noise of fp64 and nine below any wrong factor."""
    model, mup = VARIANTS[variant]
    tensors, batch = export(variant, tmp_path / "out"), random_tokens(model)
    exact = reference_module(model).logits(to_fp64(tensors).__getitem__, model, mup, batch)
    slopes_in_fp32 = 2**-24 * 40 if model.num_heads == 10 else 0.0  # where they are no powers of two
    found = loaded(tmp_path / "out").double()(batch).logits
    assert (found - exact).abs().max() <= 1e-12 + slopes_in_fp32


@every_variant
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_import_of_an_export_is_the_identity(variant: str, shard_bytes: int, tmp_path: Path) -> None:
    tensors = export(variant, tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / INDEX_FILE).exists() == (shard_bytes == 30_000)
    model, mup, read = convert.open_folder(tmp_path / "out")
    assert (model, mup) == VARIANTS[variant]
    for name, tensor in tensors.items():
        assert torch.equal(read(name), tensor), name


@every_variant
def test_what_transformers_saves_again_is_imported_the_same(variant: str, tmp_path: Path) -> None:
    tensors = export(variant, tmp_path / "out")
    loaded(tmp_path / "out").save_pretrained(tmp_path / "again")
    model, mup, read = convert.open_folder(tmp_path / "again")
    assert (model, mup) == VARIANTS[variant]
    assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


@every_variant
def test_export_in_bf16_holds_the_rounded_weights(variant: str, tmp_path: Path) -> None:
    tensors = export(variant, tmp_path / "out", dtype=torch.bfloat16)
    theirs = loaded(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    slopes = {name: value for name, value in theirs.named_buffers() if name.endswith("slopes")}
    defaults = default_tensors(VARIANTS[variant][0])
    assert all(torch.equal(value, defaults[name]) for name, value in slopes.items())
    stored = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert {name for name, value in stored.items() if value.dtype != torch.bfloat16} == slopes.keys()
    _, _, read = convert.open_folder(tmp_path / "out")
    assert all(torch.equal(read(name), tensor.bfloat16()) for name, tensor in tensors.items())


@every_variant
def test_cached_generation_is_recomputation(variant: str, tmp_path: Path) -> None:
    """Rows have different lengths and are padded on the left. The padding must have no effect."""
    model, mup = VARIANTS[variant]
    tensors = export(variant, tmp_path / "out")
    prompt = random_tokens(model, seq_len=12)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    theirs = loaded(tmp_path / "out")
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    with torch.no_grad():
        found = theirs.generate(prompt, attention_mask=mask, generation_config=settings)
    logits = torch.stack(found.logits, dim=1)
    for row, start in ((0, 5), (1, 0)):
        whole = found.sequences[row : row + 1, start:-1]
        exact = reference_module(model).logits(to_fp64(tensors).__getitem__, model, mup, whole)[:, -8:]
        ours = reference_module(model).logits(tensors.__getitem__, model, mup, whole)[:, -8:]
        assert (logits[row] - exact).abs().max() <= NOISE * max((ours - exact).abs().max(), exact.std() * 2**-22)


@pytest.mark.parametrize(
    "options",
    [
        {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 2},
        {"use_qkv_bias": True, "num_key_value_heads": 6, "partial_rotary_factor": 0.5},
        {"tie_word_embeddings": True, "num_key_value_heads": 3, "rope_theta": 500.0},
    ],
)
@pytest.mark.parametrize("norm_bias", [False, True])
def test_stablelm_made_by_transformers_is_imported(options: dict, norm_bias: bool, tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=101, hidden_size=96, intermediate_size=54, num_hidden_layers=2, num_attention_heads=6,
        initializer_range=0.1, layer_norm_eps=1e-4, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = StableLmForCausalLM(config)
    if norm_bias:
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.bias"):
                torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "made", max_shard_size="50KB")
    model, mup, read = convert.open_folder(tmp_path / "made")
    assert (model.norm_bias, mup, model.init_std) == (norm_bias, None, 0.1)
    batch = random_tokens(model)
    exact = reference_module(model).logits(lambda name: read(name).double(), model, mup, batch)
    ours = reference_module(model).logits(read, model, mup, batch)
    with torch.no_grad():
        found = theirs(batch).logits
    assert (found - exact).abs().max() <= NOISE * (ours - exact).abs().max()


@pytest.mark.parametrize("variant", ["btlm_6_heads", "stablelm_12b"])
def test_an_export_is_all_that_transformers_needs_to_write_text(variant: str, tmp_path: Path) -> None:
    """Tokenizer, settings of generation and model; Stable LM without any code of ours."""
    path, ours = tmp_path / "tokenizer.json", variant.startswith("btlm")
    write_tokenizer(path, vocab=97)
    export(variant, tmp_path / "out", tokenizer=path)
    assert {file.name for file in (tmp_path / "out").glob("*.py")} == (set(btlm.CODE_FILES) if ours else set())
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the house and a cat"
    assert found(text)["input_ids"] == Tokenizer.from_file(str(path)).encode(text).ids
    assert found.decode(found(text)["input_ids"]) == text
    assert found.eos_token == "<|endoftext|>"
    assert found.pad([found("a"), found(text)], return_tensors="pt")["attention_mask"].sum() > 0
    theirs = loaded(tmp_path / "out", trust_remote_code=ours)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    for end in (settings.eos_token_id, settings.pad_token_id, theirs.generation_config.eos_token_id):
        assert end == found.eos_token_id == theirs.config.eos_token_id
    words = theirs.generate(**found(text, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert found.decode(words[0]).startswith(text)


def test_every_token_of_an_export_has_a_gradient(tmp_path: Path) -> None:
    """A pad token in config.json would stop the gradient of its embedding row, which is also the row of EOS."""
    write_tokenizer(tmp_path / "tokenizer.json", vocab=97)
    export("stablelm_12b", tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    theirs = loaded(tmp_path / "out")
    theirs(torch.arange(101)[None]).logits.square().mean().backward()
    assert theirs.get_input_embeddings().weight.grad.abs().sum(1).min() > 0


PUBLISHED = {
    "stablelm-2-12b": {
        "architectures": ["StableLmForCausalLM"], "bos_token_id": 100_257, "eos_token_id": 100_257, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.01, "intermediate_size": 13_824, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "partial_rotary_factor": 0.25, "qk_layernorm": True, "rope_theta": 10_000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_norm_bias": False,
        "use_parallel_residual": True, "use_qkv_bias": False, "vocab_size": 100_352,
    },
    "btlm-3b-8k-base": {
        "activation_function": "swiglu", "architectures": ["BTLMLMHeadModel"], "attn_pdrop": 0.0, "bos_token_id": 50_256,
        "embd_pdrop": 0.0, "eos_token_id": 50_256, "initializer_range": 0.073, "layer_norm_epsilon": 1e-5,
        "model_type": "btlm", "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.2200000000000003,
        "mup_scale_qk_dot_by_d": True, "mup_width_scale": 0.1, "n_embd": 2560, "n_head": 32, "n_inner": 6826,
        "n_layer": 32, "n_positions": 8192, "position_embedding_type": "alibi", "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50_257,
        "auto_map": {
            "AutoConfig": "configuration_btlm.BTLMConfig", "AutoModel": "modeling_btlm.BTLMModel",
            "AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel",
        },
    },
}  # fmt: skip
NEWER = {
    "dtype", description.EXTRA_FIELDS_KEY, "rope_parameters", "alibi_scaling", "tie_word_embeddings", "pad_token_id",
    "transformers_version",
}  # fmt: skip
"""torch_dtype and the rotary fields as transformers 5 spells them, what the schema has no field for, what a released folder
leaves out where it is the class's default, and what transformers writes into every folder."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_an_export_is_the_published_one(name: str) -> None:
    """Compare every field after import and export: none is missing, none is added."""
    published = PUBLISHED[name]
    table = description.FAMILY_MODULES[published["model_type"]]
    model, mup = description.parse_model(Path("folder"), published)
    longest, end = published[table.MAX_SEQ_LEN_FIELD], published["eos_token_id"]
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    found = _build_hf_config(model, mup, ids, longest, torch.bfloat16)
    assert {key: found.get(key) for key in published} == published
    assert found.keys() - published.keys() <= NEWER


def write_tokenizer(path: Path, vocab: int, special: str = "<|endoftext|>") -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["the house and a cat"],
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=[special], show_progress=False),
    )
    made.save(str(path))


def test_the_section_without_the_marked_fields_is_that_of_a_folder_made_elsewhere(tmp_path: Path) -> None:
    export("stablelm_12b", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    del config[description.EXTRA_FIELDS_KEY]
    write_json(tmp_path / "out" / "config.json", config)
    model, _, _ = convert.open_folder(tmp_path / "out")
    wanted, _ = VARIANTS["stablelm_12b"]
    assert model == dataclasses.replace(wanted, init_truncation_sigmas=0.0, document_masking=False)
