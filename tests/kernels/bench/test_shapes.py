"""The table of shapes is what the shipped configs say."""

from pathlib import Path

import pytest
import torch

from tandem.kernels.bench.shapes import MODELS, SMALL_MODELS, TP_SIZES, Model, feed_forward, heads, logits, stream
from tandem.trainer.config import StableLM, load
from tandem.trainer.config.flops import padded
from tandem.trainer.models.mup import forward_scales

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
TABLE = {model.name: model for model in (*MODELS, *SMALL_MODELS)}


def derived(path: Path) -> Model:
    config = load(path)
    model, scales = config.model, forward_scales(config.model, config.mup)
    stable = isinstance(model, StableLM)
    return Model(
        name=path.stem,
        phases=tuple((phase.micro_rows, phase.seq_len) for phase in config.schedule.phases),
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        rotary_dims=int(model.rotary_fraction * model.head_dim) if stable else 0,
        qk_norm=stable and model.qk_norm,
        documents=model.document_masking,
        ffn_local=tuple(padded(model.ffn_width, tp_size) // tp_size for tp_size in TP_SIZES),
        vocab=model.vocab,
        vocab_local=tuple(padded(model.vocab, tp_size) // tp_size for tp_size in TP_SIZES),
        logit_scale=pytest.approx(scales.logits),
        attention_scale=pytest.approx(scales.attention),
        precision=config.run.precision,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_in_the_table_as_it_is(path):
    assert TABLE[path.stem] == derived(path)


def test_the_table_holds_nothing_else():
    assert sorted(TABLE) == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("make", [feed_forward, stream, logits, heads])
def test_shapes_have_the_precision_of_their_model(make):
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for model in TABLE.values():
        assert {shape.dtype for shape in make((model,))} == {dtypes[model.precision]}


def test_the_last_rank_holds_what_the_others_leave_of_the_vocabulary():
    assert {shape.name: (shape.columns, shape.vocab) for shape in logits()}["btlm-3b-8k tp4"] == (12_672, 12_241)
