"""The exported class in use: loss, padding, casts, training, initial weights."""

import pytest
import torch

from tandem.trainer.checkpoint.hf import btlm, modeling_btlm
from tandem.trainer.checkpoint.hf.configuration_btlm import SUPPORTED_VALUES, BTLMConfig
from tandem.trainer.checkpoint.hf.modeling_btlm import BTLMLMHeadModel
from tests.reference.variants import VARIANTS, random_tokens, reference_module, to_fp64


def made(variant: str = "btlm_6_heads", **changes) -> BTLMLMHeadModel:
    model, mup = VARIANTS[variant]
    torch.manual_seed(2)
    fields = btlm.to_hf_config(model, mup, 64) | {"bos_token_id": None, "eos_token_id": None} | changes
    return BTLMLMHeadModel(BTLMConfig(**fields)).eval()


def test_the_shipped_config_and_the_table_agree_on_what_is_fixed() -> None:
    assert SUPPORTED_VALUES == btlm.FIXED_FIELDS


@pytest.mark.parametrize(("name", "value"), [("scale_attn_weights", False), ("attn_pdrop", 0.1)])
def test_a_config_that_asks_for_more_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: .* is not supported; use "):
        BTLMConfig(**{name: value})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (4.0, "4.0 is not valid; give two keys"),
        ({"type": "linear"}, "give two keys: type, and either factor or train_seq_len"),
        ({"factor": 4.0, "train_seq_len": 8192}, "give two keys"),
        ({"type": "linear", "factor": 4.0, "train_seq_len": 8192}, "give two keys"),
        ({"type": "linear", "stretch": 4.0}, "give two keys"),
        ({"type": "dynamic", "factor": 4.0}, "type 'dynamic' is not supported; use 'linear'"),
        ({"type": "linear", "factor": 1.0}, "factor 1.0 is not valid; use a finite float above 1"),
        ({"type": "linear", "factor": 4}, "factor 4 is not valid; use a finite float above 1"),
        ({"type": "linear", "factor": float("nan")}, "factor nan is not valid; use a finite float above 1"),
        ({"type": "linear", "train_seq_len": 1}, "train_seq_len 1 is not valid; use a finite int above 1"),
        ({"type": "linear", "train_seq_len": 8192.0}, "train_seq_len 8192.0 is not valid; use a finite int above 1"),
        ({"type": "linear", "train_seq_len": True}, "train_seq_len True is not valid; use a finite int above 1"),
    ],
)
def test_a_mistaken_interpolation_is_refused(scaling: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"alibi_scaling: .*{message}"):
        BTLMConfig(alibi_scaling=scaling)


def test_loss_with_labels_is_the_mean_over_predicted_tokens() -> None:
    theirs, batch = made(), random_tokens(VARIANTS["btlm_6_heads"][0])
    labels = batch.clone()
    labels[0, :9] = -100
    logits = theirs(batch).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(theirs(batch, labels=labels).loss, wanted)  # fp32, another order of the sum


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["btlm_6_heads", "btlm_dynamic"])
def test_padding_is_invisible(variant: str, side: str) -> None:
    """Padding does not count either if the slopes depend on the length of a row."""
    theirs, batch = made(variant).double(), random_tokens(VARIANTS[variant][0])
    inside = slice(7, None) if side == "left" else slice(None, -7)
    mask = torch.zeros_like(batch)
    mask[:, inside] = 1
    found = theirs(batch, attention_mask=mask).logits[:, inside]
    alone = theirs(batch[:, inside]).logits
    assert (found - alone).abs().max() < 1e-12  # fp64: sums over other lengths
    assert (theirs(batch).logits[:, inside] - alone).abs().max() > 1e-6 or side == "right"


def test_blocks_of_queries_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, batch = made().double(), random_tokens(VARIANTS["btlm_6_heads"][0])
    whole = theirs(batch).logits
    monkeypatch.setattr(modeling_btlm, "QUERY_BLOCK_SIZE", 7)
    assert (theirs(batch).logits - whole).abs().max() < 1e-12


def test_slopes_stay_exact_and_frozen_when_the_model_is_cast() -> None:
    theirs = made("btlm_untied")
    exact = theirs.transformer.relative_pe.slopes.clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    found = theirs.to(torch.bfloat16).transformer.relative_pe.slopes
    assert torch.equal(found, exact)
    assert not found.requires_grad
    assert theirs(random_tokens(VARIANTS["btlm_untied"][0])).logits.dtype == torch.bfloat16


def test_gradients_are_the_same_with_checkpointing() -> None:
    batch, gradients = random_tokens(VARIANTS["btlm_mup"][0]), []
    for checkpointing in (False, True):
        theirs = made("btlm_mup").train()
        if checkpointing:
            theirs.activation_checkpointing_enable()
        theirs(batch, labels=batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_fresh_weights_have_the_published_standard_deviations() -> None:
    """The std is sigma, times sqrt(width scale), divided by sqrt(2 * depth); to 5 standard errors."""
    theirs = made(n_embd=96, mup_width_scale=0.25, initializer_range=0.073, n_layer=8)
    weights, count = dict(theirs.named_parameters()), 96 * 96
    for name, std in (
        ("transformer.wte.weight", 0.073),
        ("transformer.h.3.attn.c_attn.weight", 0.073 / 2),
        ("transformer.h.3.mlp.c_fc2.weight", 0.073 / 2),
        ("transformer.h.3.attn.c_proj.weight", 0.073 / 2 / 4),
    ):
        assert abs(weights[name].std() / std - 1) < 5 / (2 * min(count, weights[name].numel())) ** 0.5, name
    assert all((weights[name] == 0).all() for name in weights if name.endswith("bias"))


def test_hidden_states_and_kept_logits_are_those_asked_for() -> None:
    theirs, batch = made(), random_tokens(VARIANTS["btlm_6_heads"][0])
    output = theirs(batch, output_hidden_states=True, logits_to_keep=3)
    assert len(output.hidden_states) == theirs.config.n_layer + 1
    assert output.logits.shape[1] == 3
    assert theirs(batch).hidden_states is None


def test_embeddings_can_be_given_instead_of_tokens() -> None:
    theirs, batch = made(), random_tokens(VARIANTS["btlm_6_heads"][0])
    given = theirs(inputs_embeds=theirs.get_input_embeddings()(batch)).logits
    assert torch.equal(given, theirs(batch).logits)


def test_reference_and_shipped_code_disagree_when_the_scale_is_the_root() -> None:
    """Check that the comparison can fail: 1 / sqrt(head_dim) under muP is far outside every tolerance here."""
    model, mup = VARIANTS["btlm_mup"]
    tensors, batch = to_fp64(reference_module(model).random_tensors(model, seed=3)), random_tokens(model)
    with_mup = reference_module(model).logits(tensors.__getitem__, model, mup, batch)
    theirs = made("btlm_mup", mup_scale_qk_dot_by_d=False)
    assert theirs.transformer.h[0].attn.scale != 1 / model.head_dim
    assert (with_mup - reference_module(model).logits(tensors.__getitem__, model, None, batch)).abs().max() > 0.1
