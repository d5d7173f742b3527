"""The table of shapes matches the shipped configs."""

from pathlib import Path

import pytest
import torch

from tandem.kernels.bench.shapes import MODELS, SMALL_MODELS, TP_SIZES, Model, attention_shapes, token_shapes
from tandem.trainer.config import StableLMConfig, load_config
from tandem.trainer.config.padding import padded_size
from tandem.trainer.models.mup import forward_scales
from tests.rivals.kernels.shapes import residual_shapes

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TABLE = {model.name: model for model in (*MODELS, *SMALL_MODELS)}


def derived(path: Path) -> Model:
    config = load_config(path)
    model, scales = config.model, forward_scales(config.model, config.mup)
    stable = isinstance(model, StableLMConfig)
    return Model(
        name=path.stem,
        phases=tuple((phase.micro_batch_size, phase.seq_len) for phase in config.schedule.phases),
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rotary_dims=int(model.partial_rotary_factor * model.head_dim) if stable else 0,
        qk_layernorm=stable and model.qk_layernorm,
        document_masking=model.document_masking,
        ffn_hidden_size=padded_size(model.ffn_hidden_size, 1),
        vocab_size=model.vocab_size,
        logit_scale=pytest.approx(scales.logits),
        attention_scale=pytest.approx(scales.attention),
        dtype=DTYPES[config.run.precision],
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_in_the_table_as_it_is(path):
    assert TABLE[path.stem] == derived(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_rank_holds_what_the_trainer_gives_it(path):
    model = load_config(path).model
    for tp_size in TP_SIZES:
        padded = padded_size(model.ffn_hidden_size, tp_size), padded_size(model.vocab_size, tp_size)
        for shape in token_shapes((TABLE[path.stem],), (tp_size,)):
            assert (shape.ffn_hidden_size * tp_size, shape.padded_vocab_size * tp_size) == padded


def test_the_table_holds_nothing_else():
    assert sorted(TABLE) == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("make", [token_shapes, residual_shapes, attention_shapes])
def test_shapes_have_the_precision_of_their_model(make):
    for model in TABLE.values():
        assert {shape.dtype for shape in make((model,))} == {model.dtype}


def test_the_last_rank_holds_what_the_others_leave_of_the_vocabulary():
    assert {shape.name: (shape.padded_vocab_size, shape.vocab_size) for shape in token_shapes()}["btlm-3b-8k tp4"] == (
        12_672,
        12_241,
    )
