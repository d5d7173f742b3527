"""The table of shapes matches the shipped configs."""

from pathlib import Path

import pytest
import torch

from tandem.kernels.bench.shapes import (
    MODELS,
    SMALL_MODELS,
    TP_SIZES,
    ModelShape,
    attention_shapes,
    feed_forward_shapes,
    logits_shapes,
)
from tandem.trainer.config import StableLMConfig, load_config
from tandem.trainer.config.padding import padded_size
from tandem.trainer.models.mup import forward_scales
from tests.rivals.kernels.shapes import residual_shapes

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
TABLE = {model.name: model for model in (*MODELS, *SMALL_MODELS)}


def derived(path: Path) -> ModelShape:
    config = load_config(path)
    model, scales = config.model, forward_scales(config.model, config.mup)
    stable = isinstance(model, StableLMConfig)
    return ModelShape(
        name=path.stem,
        phases=tuple((phase.micro_batch_size, phase.seq_len) for phase in config.schedule.phases),
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rotary_dims=int(model.partial_rotary_factor * model.head_dim) if stable else 0,
        qk_layernorm=stable and model.qk_layernorm,
        document_masking=model.document_masking,
        ffn_hidden_sizes_local=tuple(padded_size(model.ffn_hidden_size, tp_size) // tp_size for tp_size in TP_SIZES),
        vocab_size=model.vocab_size,
        vocab_sizes_local=tuple(padded_size(model.vocab_size, tp_size) // tp_size for tp_size in TP_SIZES),
        logit_scale=pytest.approx(scales.logits),
        attention_scale=pytest.approx(scales.attention),
        precision=config.run.precision,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_in_the_table_as_it_is(path):
    assert TABLE[path.stem] == derived(path)


def test_the_table_holds_nothing_else():
    assert sorted(TABLE) == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("make", [feed_forward_shapes, residual_shapes, logits_shapes, attention_shapes])
def test_shapes_have_the_precision_of_their_model(make):
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for model in TABLE.values():
        assert {shape.dtype for shape in make((model,))} == {dtypes[model.precision]}


def test_the_last_rank_holds_what_the_others_leave_of_the_vocabulary():
    assert {shape.name: (shape.padded_vocab_size, shape.vocab_size) for shape in logits_shapes()}["btlm-3b-8k tp4"] == (
        12_672,
        12_241,
    )
