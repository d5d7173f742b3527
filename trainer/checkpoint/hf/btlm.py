"""BTLM as cerebras/btlm-3b-8k-base publishes it: table of tensors and fields of config.json.

Matrices lie as [in, out], query, key and value are one tensor in that order, `c_fc` is the value and `c_fc2`
the gate. transformers has no such class; an export ships `modeling_btlm.py` and `configuration_btlm.py`.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from tandem.kernels.attention import alibi_slopes
from tandem.trainer.checkpoint.hf.tensor_mapping import Piece, Row, whole
from tandem.trainer.config import BTLM, AlibiScaling, Mup, UserError, check_alibi_scaling, section_from

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
MAX_SEQ_LEN = "n_positions"
CODE = ("configuration_btlm.py", "modeling_btlm.py")
"""Files of code shipped in an export."""

FIXED = {
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "position_embedding_type": "alibi",
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
"""Published fields that have one value."""


def rows(model: BTLM) -> Iterator[Row]:
    """The row of every tensor of the model, from the embedding to the head."""
    width, ffn_width = model.width, model.ffn_width
    yield whole("embedding.weight", EMBEDDING, model.vocab, width)
    for index in range(model.depth):
        ours, theirs = f"layers.{index}", f"transformer.h.{index}"
        yield from _norm(model, f"{ours}.attention_norm", f"{theirs}.ln_1")
        yield from _qkv(model, f"{ours}.attention.qkv", f"{theirs}.attn.c_attn")
        yield from _linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", width, width)
        yield from _norm(model, f"{ours}.ffn_norm", f"{theirs}.ln_2")
        yield from _gate_up(model, f"{ours}.ffn.gate_up", f"{theirs}.mlp")
        yield from _linear(f"{ours}.ffn.down", f"{theirs}.mlp.c_proj", width, ffn_width)
    yield from _norm(model, "final_norm", "transformer.ln_f")
    if not model.tied_head:
        yield whole("head.weight", HEAD, model.vocab, width)


def defaults(model: BTLM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a folder holds although it is no parameter: the ALiBi slopes, in fp32 whatever the rest is in."""
    return {"transformer.relative_pe.slopes": alibi_slopes(model.heads).unsqueeze(-1)}


def fields(model: BTLM, mup: Mup | None, max_seq_len: int) -> dict[str, Any]:
    """config.json: the published fields, and where transformers finds the classes."""
    classes = {"AutoModel": "BTLMModel", "AutoModelForCausalLM": "BTLMLMHeadModel"}
    return {
        "architectures": ["BTLMLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_btlm.BTLMConfig",
            **{auto: f"modeling_btlm.{name}" for auto, name in classes.items()},
        },
        "model_type": "btlm",
        "alibi_scaling": _published(model.alibi_scaling),
        "initializer_range": model.init_std,
        "layer_norm_epsilon": model.norm_epsilon,
        "mup_embeddings_scale": mup.embedding_multiplier if mup else 1.0,
        "mup_output_alpha": mup.output_multiplier if mup else 1.0,
        "mup_scale_qk_dot_by_d": mup is not None,
        "mup_width_scale": mup.base_width / model.width if mup else 1.0,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_inner": model.ffn_width,
        "n_layer": model.depth,
        "n_positions": max_seq_len,
        "tie_word_embeddings": model.tied_head,
        "use_cache": True,
        "vocab_size": model.vocab,
        **FIXED,
    }


OLDER = ("embeddings_scale", "output_logits_scale", "scale_qk_dot_by_d", "width_scale")
"""Names of the muP factors before they began with mup_."""


def section(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model and muP sections of a config.json, as plain trees without what the published schema lacks.

    Raises: UserError for a variant the family does not have, KeyError where a required field is missing.
    """
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise UserError(f"config.json: {name} {given[name]!r}; BTLM has {value!r}; choose another folder")
    older = [name for name in OLDER if name in given]
    if older:
        raise UserError(
            f"config.json: {older[0]} {given[older[0]]!r}; is of an older revision of the schema, whose factors are not "
            "read; take the newest revision of the folder"
        )
    model = {
        "family": "btlm",
        "width": given["n_embd"],
        "depth": given["n_layer"],
        "heads": given["n_head"],
        "ffn_width": given["n_inner"],
        "vocab": given["vocab_size"],
        "norm_epsilon": given.get("layer_norm_epsilon", 1e-5),
        "init_std": given.get("initializer_range", 0.02),
        "tied_head": given.get("tie_word_embeddings", True),
        "alibi_scaling": _checked(given.get("alibi_scaling")),
    }
    return model, _mup(given)


def _published(scaling: AlibiScaling | None) -> dict[str, Any] | None:
    """The two keys of the published schema: type, and the number that is given."""
    return {key: value for key, value in asdict(scaling).items() if value is not None} if scaling else None


def _checked(scaling: Any) -> Any:
    where = "config.json: alibi_scaling"
    if scaling is not None:
        check_alibi_scaling(section_from(AlibiScaling, scaling, where), where)
    return scaling


def _mup(given: dict[str, Any]) -> dict[str, Any] | None:
    names = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha")
    width_scale, embeddings_scale, output_alpha = scales = tuple(given.get(name, 1.0) for name in names)
    base_width = round(width_scale * given["n_embd"])
    if not given.get("mup_scale_qk_dot_by_d", False):
        if scales != (1.0, 1.0, 1.0):
            raise UserError(
                "config.json: mup_scale_qk_dot_by_d false with other muP scales than 1; muP is all on or all "
                "off; choose another folder"
            )
        return None
    if base_width < 1 or abs(width_scale * given["n_embd"] - base_width) > 1e-6 * base_width:
        raise UserError(
            f"config.json: mup_width_scale {width_scale} of n_embd {given['n_embd']}; must give a whole base "
            "width; correct the field"
        )
    return {
        "base_width": base_width,
        "embedding_multiplier": embeddings_scale,
        "output_multiplier": output_alpha,
    }


def _norm(model: BTLM, ours: str, theirs: str) -> Iterator[Row]:
    for suffix in ("weight", "bias"):
        yield whole(f"{ours}.{suffix}", f"{theirs}.{suffix}", model.width)


def _linear(ours: str, theirs: str, outputs: int, inputs: int) -> Iterator[Row]:
    shape = (outputs, inputs)
    yield Row(f"{ours}.weight", shape, shape, (Piece(f"{theirs}.weight", (inputs, outputs), transposed=True),))
    yield whole(f"{ours}.bias", f"{theirs}.bias", outputs)


def _qkv(model: BTLM, ours: str, theirs: str) -> Iterator[Row]:
    """Ours is grouped by head, theirs by query, key and value."""
    width, view = model.width, (model.heads, 3, model.head_dim)
    matrix = Piece(f"{theirs}.weight", (width, 3 * width), axes=(1, 0, 2, 3), transposed=True)
    yield Row(f"{ours}.weight", (3 * width, width), (*view, width), (matrix,))
    yield Row(f"{ours}.bias", (3 * width,), view, (Piece(f"{theirs}.bias", (3 * width,), axes=(1, 0, 2)),))


def _gate_up(model: BTLM, ours: str, theirs: str) -> Iterator[Row]:
    width, ffn_width, names = model.width, model.ffn_width, ("c_fc2", "c_fc")
    matrices = (
        Piece(f"{theirs}.{name}.weight", (width, ffn_width), (which,), transposed=True)
        for which, name in enumerate(names)
    )
    yield Row(f"{ours}.weight", (2, ffn_width, width), (2, ffn_width, width), tuple(matrices))
    biases = (Piece(f"{theirs}.{name}.bias", (ffn_width,), (which,)) for which, name in enumerate(names))
    yield Row(f"{ours}.bias", (2, ffn_width), (2, ffn_width), tuple(biases))
