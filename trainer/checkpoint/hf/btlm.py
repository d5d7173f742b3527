"""BTLM as cerebras/btlm-3b-8k-base publishes it: table of tensors and fields of config.json.

Matrices lie as [in, out], query, key and value are one tensor in that order, `c_fc` is the value and `c_fc2`
the gate. transformers has no such class; an export ships `modeling_btlm.py` and `configuration_btlm.py`.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from tandem.kernels.attention import alibi_slopes
from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping
from tandem.trainer.config import (
    AlibiScalingConfig,
    BTLMConfig,
    MupConfig,
    UserError,
    check_alibi_scaling,
    parse_dataclass,
)

EMBEDDING_NAME, HEAD_NAME = "transformer.wte.weight", "lm_head.weight"
MAX_SEQ_LEN_FIELD = "n_positions"
CODE_FILES = ("configuration_btlm.py", "modeling_btlm.py")
"""Files of code shipped in an export."""

FIXED_FIELDS = {
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


def tensor_mappings(model: BTLMConfig) -> Iterator[TensorMapping]:
    """The row of every tensor of the model, from the embedding to the head."""
    hidden_size, ffn_hidden_size = model.hidden_size, model.ffn_hidden_size
    yield identity_mapping("embedding.weight", EMBEDDING_NAME, model.vocab_size, hidden_size)
    for index in range(model.num_layers):
        prefix, hf_prefix = f"layers.{index}", f"transformer.h.{index}"
        yield from _norm_mappings(model, f"{prefix}.attention_norm", f"{hf_prefix}.ln_1")
        yield from _qkv_mappings(model, f"{prefix}.attention.qkv", f"{hf_prefix}.attn.c_attn")
        yield from _linear_mappings(f"{prefix}.attention.out", f"{hf_prefix}.attn.c_proj", hidden_size, hidden_size)
        yield from _norm_mappings(model, f"{prefix}.ffn_norm", f"{hf_prefix}.ln_2")
        yield from _gate_up_mappings(model, f"{prefix}.ffn.gate_up", f"{hf_prefix}.mlp")
        yield from _linear_mappings(f"{prefix}.ffn.down", f"{hf_prefix}.mlp.c_proj", hidden_size, ffn_hidden_size)
    yield from _norm_mappings(model, "final_norm", "transformer.ln_f")
    if not model.tie_word_embeddings:
        yield identity_mapping("head.weight", HEAD_NAME, model.vocab_size, hidden_size)


def default_tensors(model: BTLMConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a folder holds although it is no parameter: the ALiBi slopes, in fp32 whatever the rest is in."""
    return {"transformer.relative_pe.slopes": alibi_slopes(model.num_heads).unsqueeze(-1)}


def to_hf_config(model: BTLMConfig, mup: MupConfig | None, max_seq_len: int) -> dict[str, Any]:
    """config.json: the published fields, and where transformers finds the classes."""
    classes = {"AutoModel": "BTLMModel", "AutoModelForCausalLM": "BTLMLMHeadModel"}
    return {
        "architectures": ["BTLMLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_btlm.BTLMConfig",
            **{auto: f"modeling_btlm.{name}" for auto, name in classes.items()},
        },
        "model_type": "btlm",
        "alibi_scaling": _alibi_scaling_to_hf(model.alibi_scaling),
        "initializer_range": model.init_std,
        "layer_norm_epsilon": model.norm_eps,
        "mup_embeddings_scale": mup.embedding_multiplier if mup else 1.0,
        "mup_output_alpha": mup.output_multiplier if mup else 1.0,
        "mup_scale_qk_dot_by_d": mup is not None,
        "mup_width_scale": mup.base_hidden_size / model.hidden_size if mup else 1.0,
        "n_embd": model.hidden_size,
        "n_head": model.num_heads,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_positions": max_seq_len,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **FIXED_FIELDS,
    }


OLD_MUP_FIELDS = ("embeddings_scale", "output_logits_scale", "scale_qk_dot_by_d", "width_scale")
"""Names of the muP factors before they began with mup_."""


def from_hf_config(hf_config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model and muP sections of a config.json, as plain trees without what the published schema lacks.

    Raises: UserError for a variant the family does not have, KeyError where a required field is missing.
    """
    for name, value in FIXED_FIELDS.items():
        if hf_config.get(name, value) != value:
            raise UserError(f"config.json: {name} {hf_config[name]!r}; BTLM has {value!r}; choose another folder")
    older = [name for name in OLD_MUP_FIELDS if name in hf_config]
    if older:
        raise UserError(
            f"config.json: {older[0]} {hf_config[older[0]]!r}; is of an older revision of the schema, whose factors are not "
            "read; take the newest revision of the folder"
        )
    model = {
        "family": "btlm",
        "hidden_size": hf_config["n_embd"],
        "num_layers": hf_config["n_layer"],
        "num_heads": hf_config["n_head"],
        "ffn_hidden_size": hf_config["n_inner"],
        "vocab_size": hf_config["vocab_size"],
        "norm_eps": hf_config.get("layer_norm_epsilon", 1e-5),
        "init_std": hf_config.get("initializer_range", 0.02),
        "tie_word_embeddings": hf_config.get("tie_word_embeddings", True),
        "alibi_scaling": _check_alibi_scaling(hf_config.get("alibi_scaling")),
    }
    return model, _mup_from_hf(hf_config)


def _alibi_scaling_to_hf(scaling: AlibiScalingConfig | None) -> dict[str, Any] | None:
    """The two keys of the published schema: type, and the number that is given."""
    return {key: value for key, value in asdict(scaling).items() if value is not None} if scaling else None


def _check_alibi_scaling(scaling: Any) -> Any:
    where = "config.json: alibi_scaling"
    if scaling is not None:
        check_alibi_scaling(parse_dataclass(AlibiScalingConfig, scaling, where), where)
    return scaling


def _mup_from_hf(hf_config: dict[str, Any]) -> dict[str, Any] | None:
    names = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha")
    width_scale, embeddings_scale, output_alpha = scales = tuple(hf_config.get(name, 1.0) for name in names)
    base_hidden_size = round(width_scale * hf_config["n_embd"])
    if not hf_config.get("mup_scale_qk_dot_by_d", False):
        if scales != (1.0, 1.0, 1.0):
            raise UserError(
                "config.json: mup_scale_qk_dot_by_d false with other muP scales than 1; muP is all on or all "
                "off; choose another folder"
            )
        return None
    if base_hidden_size < 1 or abs(width_scale * hf_config["n_embd"] - base_hidden_size) > 1e-6 * base_hidden_size:
        raise UserError(
            f"config.json: mup_width_scale {width_scale} of n_embd {hf_config['n_embd']}; must give a whole base "
            "width; correct the field"
        )
    return {
        "base_hidden_size": base_hidden_size,
        "embedding_multiplier": embeddings_scale,
        "output_multiplier": output_alpha,
    }


def _norm_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    for suffix in ("weight", "bias"):
        yield identity_mapping(f"{prefix}.{suffix}", f"{hf_prefix}.{suffix}", model.hidden_size)


def _linear_mappings(prefix: str, hf_prefix: str, outputs: int, inputs: int) -> Iterator[TensorMapping]:
    shape = (outputs, inputs)
    yield TensorMapping(
        f"{prefix}.weight", shape, shape, (HFTensor(f"{hf_prefix}.weight", (inputs, outputs), is_transposed=True),)
    )
    yield identity_mapping(f"{prefix}.bias", f"{hf_prefix}.bias", outputs)


def _qkv_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    """Ours is grouped by head, theirs by query, key and value."""
    hidden_size, view = model.hidden_size, (model.num_heads, 3, model.head_dim)
    matrix = HFTensor(
        f"{hf_prefix}.weight", (hidden_size, 3 * hidden_size), permutation=(1, 0, 2, 3), is_transposed=True
    )
    yield TensorMapping(f"{prefix}.weight", (3 * hidden_size, hidden_size), (*view, hidden_size), (matrix,))
    yield TensorMapping(
        f"{prefix}.bias",
        (3 * hidden_size,),
        view,
        (HFTensor(f"{hf_prefix}.bias", (3 * hidden_size,), permutation=(1, 0, 2)),),
    )


def _gate_up_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    hidden_size, ffn_hidden_size, hf_suffixes = model.hidden_size, model.ffn_hidden_size, ("c_fc2", "c_fc")
    matrices = (
        HFTensor(f"{hf_prefix}.{hf_suffix}.weight", (hidden_size, ffn_hidden_size), (part_index,), is_transposed=True)
        for part_index, hf_suffix in enumerate(hf_suffixes)
    )
    yield TensorMapping(
        f"{prefix}.weight", (2, ffn_hidden_size, hidden_size), (2, ffn_hidden_size, hidden_size), tuple(matrices)
    )
    biases = (
        HFTensor(f"{hf_prefix}.{name}.bias", (ffn_hidden_size,), (which,)) for which, name in enumerate(hf_suffixes)
    )
    yield TensorMapping(f"{prefix}.bias", (2, ffn_hidden_size), (2, ffn_hidden_size), tuple(biases))
