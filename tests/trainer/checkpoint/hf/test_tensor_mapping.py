"""The tables map every element once and have the shapes of the published models."""

import math

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from tandem.trainer.checkpoint.hf import configuration_btlm, description, stablelm
from tandem.trainer.checkpoint.hf.modeling_btlm import BTLMLMHeadModel
from tandem.trainer.checkpoint.hf.tensor_conversion import default_tensors, from_hf_tensors, to_hf_tensor
from tandem.trainer.config import BTLMConfig, StableLMConfig
from tests.reference.variants import VARIANTS, reference_module

STABLELM_2_12B = StableLMConfig(
    family="stablelm", hidden_size=5120, num_layers=40, num_heads=32, ffn_hidden_size=13_824, vocab_size=100_352, norm_eps=1e-5,
    init_std=0.01, init_truncation_sigmas=0.0, document_masking=True, num_kv_heads=8, partial_rotary_factor=0.25,
    rotary_base=10_000.0, parallel_residual=True, qk_layernorm=True, qkv_bias=False, norm_bias=False,
    tie_word_embeddings=False,
)  # fmt: skip
STABLELM_2_1_6B = StableLMConfig(
    family="stablelm", hidden_size=2048, num_layers=24, num_heads=32, ffn_hidden_size=5632, vocab_size=100_352, norm_eps=1e-5,
    init_std=0.02, init_truncation_sigmas=0.0, document_masking=True, num_kv_heads=32, partial_rotary_factor=0.25,
    rotary_base=10_000.0, parallel_residual=False, qk_layernorm=False, qkv_bias=True, norm_bias=True,
    tie_word_embeddings=False,
)  # fmt: skip
BTLM_3B = BTLMConfig(
    family="btlm", hidden_size=2560, num_layers=32, num_heads=32, ffn_hidden_size=6826, vocab_size=50_257, norm_eps=1e-5,
    init_std=0.073, init_truncation_sigmas=2.0, document_masking=False, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_element_is_in_one_place_and_comes_back(variant: str) -> None:
    model, _ = VARIANTS[variant]
    for row in description.FAMILY_MODULES[model.family].tensor_mappings(model):
        ours = torch.arange(math.prod(row.shape)).view(row.shape)
        theirs = {piece.hf_name: to_hf_tensor(row, piece, ours) for piece in row.hf_tensors}
        assert [tuple(theirs[piece.hf_name].shape) for piece in row.hf_tensors] == [
            piece.shape for piece in row.hf_tensors
        ]
        assert torch.equal(torch.cat([part.flatten() for part in theirs.values()]).sort().values, ours.flatten())
        assert torch.equal(from_hf_tensors(row, theirs.__getitem__), ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_names_and_shapes_are_the_references(variant: str) -> None:
    model, _ = VARIANTS[variant]
    rows = description.FAMILY_MODULES[model.family].tensor_mappings(model)
    assert {row.name: row.shape for row in rows} == reference_module(model).shapes(model)


@pytest.mark.parametrize("model", [STABLELM_2_12B, STABLELM_2_1_6B, BTLM_3B], ids=["12b", "1_6b", "3b"])
def test_names_and_shapes_are_those_of_the_full_size_class(model: StableLMConfig | BTLMConfig) -> None:
    table = description.FAMILY_MODULES[model.family]
    config, made = (
        (StableLmConfig, StableLmForCausalLM) if table is stablelm else (configuration_btlm.BTLMConfig, BTLMLMHeadModel)
    )
    with torch.device("meta"):
        theirs = made(config(**table.to_hf_config(model, None, 4096))).state_dict()
    mapped = {piece.hf_name: piece.shape for row in table.tensor_mappings(model) for piece in row.hf_tensors}
    defaults = {name: tuple(value.shape) for name, value in default_tensors(model).items()}
    tied = {table.HEAD_NAME} if model.tie_word_embeddings else set()
    assert {name: tuple(value.shape) for name, value in theirs.items() if name not in tied} == mapped | defaults


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(STABLELM_2_12B, 12_142_976_000), (STABLELM_2_1_6B, 1_644_515_328), (BTLM_3B, 2_646_255_744)],
    ids=["12b", "1_6b", "3b"],
)
def test_full_size_models_have_the_published_number_of_parameters(
    model: StableLMConfig | BTLMConfig, parameters: int
) -> None:
    """12B without the zero norm biases that only transformers has."""
    table = description.FAMILY_MODULES[model.family]
    assert sum(math.prod(row.shape) for row in table.tensor_mappings(model)) == parameters


@pytest.mark.parametrize("heads", [1, 4, 5, 6, 12, 32, 40])
def test_slopes_of_table_shipped_code_and_reference_are_one(heads: int) -> None:
    from tandem.kernels.attention import alibi_slopes as of_the_table
    from tandem.trainer.checkpoint.hf.modeling_btlm import alibi_slopes
    from tests.reference.btlm import slopes

    wanted = torch.tensor(slopes(heads))
    assert torch.equal(of_the_table(heads), wanted)
    assert torch.equal(alibi_slopes(heads).flatten(), wanted)
