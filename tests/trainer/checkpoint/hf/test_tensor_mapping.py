"""The tables: nothing lost, nothing twice, and the shapes of the published models."""

import math

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from tandem.trainer.checkpoint.hf import convert, stablelm
from tandem.trainer.checkpoint.hf.configuration_btlm import BTLMConfig
from tandem.trainer.checkpoint.hf.modeling_btlm import BTLMLMHeadModel
from tandem.trainer.checkpoint.hf.tensor_mapping import cut, join
from tandem.trainer.config import BTLM, StableLM
from tests.reference.variants import VARIANTS, reference

STABLELM_2_12B = StableLM(
    family="stablelm", width=5120, depth=40, heads=32, ffn_width=13_824, vocab=100_352, norm_epsilon=1e-5,
    init_std=0.01, init_truncation_sigmas=0.0, document_masking=True, kv_heads=8, rotary_fraction=0.25,
    rotary_base=10_000.0, parallel_residual=True, qk_norm=True, qkv_bias=False, norm_bias=False,
    tied_head=False,
)  # fmt: skip
STABLELM_2_1_6B = StableLM(
    family="stablelm", width=2048, depth=24, heads=32, ffn_width=5632, vocab=100_352, norm_epsilon=1e-5,
    init_std=0.02, init_truncation_sigmas=0.0, document_masking=True, kv_heads=32, rotary_fraction=0.25,
    rotary_base=10_000.0, parallel_residual=False, qk_norm=False, qkv_bias=True, norm_bias=True,
    tied_head=False,
)  # fmt: skip
BTLM_3B = BTLM(
    family="btlm", width=2560, depth=32, heads=32, ffn_width=6826, vocab=50_257, norm_epsilon=1e-5,
    init_std=0.073, init_truncation_sigmas=2.0, document_masking=False, tied_head=True,
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_element_is_in_one_place_and_comes_back(variant: str) -> None:
    model, _ = VARIANTS[variant]
    for row in convert.TABLES[model.family].rows(model):
        ours = torch.arange(math.prod(row.shape)).view(row.shape)
        theirs = {piece.theirs: cut(row, piece, ours) for piece in row.pieces}
        assert [tuple(theirs[piece.theirs].shape) for piece in row.pieces] == [piece.shape for piece in row.pieces]
        assert torch.equal(torch.cat([part.flatten() for part in theirs.values()]).sort().values, ours.flatten())
        assert torch.equal(join(row, theirs.__getitem__), ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_names_and_shapes_are_the_references(variant: str) -> None:
    model, _ = VARIANTS[variant]
    rows = convert.TABLES[model.family].rows(model)
    assert {row.ours: row.shape for row in rows} == reference(model).shapes(model)


@pytest.mark.parametrize("model", [STABLELM_2_12B, STABLELM_2_1_6B, BTLM_3B], ids=["12b", "1_6b", "3b"])
def test_names_and_shapes_are_those_of_the_full_size_class(model: StableLM | BTLM) -> None:
    table = convert.TABLES[model.family]
    config, made = (StableLmConfig, StableLmForCausalLM) if table is stablelm else (BTLMConfig, BTLMLMHeadModel)
    with torch.device("meta"):
        theirs = made(config(**table.fields(model, None, 4096))).state_dict()
    mapped = {piece.theirs: piece.shape for row in table.rows(model) for piece in row.pieces}
    defaults = {name: tuple(value.shape) for name, value in table.defaults(model).items()}
    tied = {table.HEAD} if model.tied_head else set()
    assert {name: tuple(value.shape) for name, value in theirs.items() if name not in tied} == mapped | defaults


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(STABLELM_2_12B, 12_142_976_000), (STABLELM_2_1_6B, 1_644_515_328), (BTLM_3B, 2_646_255_744)],
    ids=["12b", "1_6b", "3b"],
)
def test_full_size_models_have_the_published_number_of_parameters(model: StableLM | BTLM, parameters: int) -> None:
    """12B without the zero norm biases that only transformers has."""
    table = convert.TABLES[model.family]
    assert sum(math.prod(row.shape) for row in table.rows(model)) == parameters


@pytest.mark.parametrize("heads", [1, 4, 5, 6, 12, 32, 40])
def test_slopes_of_table_shipped_code_and_reference_are_one(heads: int) -> None:
    from tandem.kernels.attention import alibi_slopes as of_the_table
    from tandem.trainer.checkpoint.hf.modeling_btlm import alibi_slopes
    from tests.reference.btlm import slopes

    wanted = torch.tensor(slopes(heads))
    assert torch.equal(of_the_table(heads), wanted)
    assert torch.equal(alibi_slopes(heads).flatten(), wanted)
