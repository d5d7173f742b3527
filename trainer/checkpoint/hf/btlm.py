"""BTLM in the format of cerebras/btlm-3b-8k-base: its tensors and the fields of config.json.

Matrices are stored [in, out]. Query, key and value are one tensor, in that order. `c_fc` is the value and `c_fc2` the gate of
SwiGLU. transformers has no BTLM class, so an export includes `modeling_btlm.py` and `configuration_btlm.py`.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from tandem.kernels.attention import alibi_slopes
from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping, stacked_mapping
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
"""Code files copied into an export."""

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
"""Published fields for which we support only one value."""
MODEL_FIELDS = {
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "ffn_hidden_size": "n_inner",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Maps our fields to the published ones."""
FIELD_DEFAULTS = {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True}


def tensor_mappings(model: BTLMConfig) -> Iterator[TensorMapping]:
    """Map every tensor of the model, from the embedding to the head."""
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
    """Return the tensors of a folder that are not parameters: the ALiBi slopes, always in fp32."""
    return {"transformer.relative_pe.slopes": alibi_slopes(model.num_heads).unsqueeze(-1)}


def to_hf_config(model: BTLMConfig, mup: MupConfig | None, max_seq_len: int) -> dict[str, Any]:
    """Build config.json. `auto_map` in it lists the classes that transformers' Auto classes load."""
    scaling = model.alibi_scaling
    return {
        "architectures": ["BTLMLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_btlm.BTLMConfig",
            "AutoModel": "modeling_btlm.BTLMModel",
            "AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel",
        },
        "model_type": "btlm",
        "alibi_scaling": scaling and {key: value for key, value in asdict(scaling).items() if value is not None},
        "mup_embeddings_scale": mup.embedding_multiplier if mup else 1.0,
        "mup_output_alpha": mup.output_multiplier if mup else 1.0,
        "mup_scale_qk_dot_by_d": mup is not None,
        "mup_width_scale": mup.base_hidden_size / model.hidden_size if mup else 1.0,
        "n_positions": max_seq_len,
        "use_cache": True,
        **{theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()},
        **FIXED_FIELDS,
    }


OLD_MUP_FIELDS = ("embeddings_scale", "output_logits_scale", "scale_qk_dot_by_d", "width_scale")
"""Names of the muP fields in older revisions of the schema."""


def from_hf_config(hf_config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the model and muP sections for a config.json, without the fields that the published schema lacks.

    Raises: UserError for a variant that BTLM does not have. KeyError if a required field is missing.
    """
    for name, value in FIXED_FIELDS.items():
        if hf_config.get(name, value) != value:
            raise UserError(
                f"config.json: {name} is {hf_config[name]!r}, but BTLM needs {value!r}; choose another folder"
            )
    if older := [name for name in OLD_MUP_FIELDS if name in hf_config]:
        raise UserError(
            f"config.json: {older[0]} ({hf_config[older[0]]!r}) belongs to an older revision of the schema, which is not "
            "supported; use the newest revision of the folder"
        )
    scaling, field = hf_config.get("alibi_scaling"), "config.json: alibi_scaling"
    if scaling is not None:
        check_alibi_scaling(parse_dataclass(AlibiScalingConfig, scaling, field), field)
    fields = FIELD_DEFAULTS | hf_config
    model = {ours: fields[theirs] for ours, theirs in MODEL_FIELDS.items()}
    return {"family": "btlm", **model, "alibi_scaling": scaling}, _mup_from_hf(hf_config)


def _mup_from_hf(hf_config: dict[str, Any]) -> dict[str, Any] | None:
    names = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha")
    width_scale, embeddings_scale, output_alpha = scales = tuple(hf_config.get(name, 1.0) for name in names)
    base_hidden_size = round(width_scale * hf_config["n_embd"])
    if not hf_config.get("mup_scale_qk_dot_by_d", False):
        if scales != (1.0, 1.0, 1.0):
            raise UserError(
                "config.json: mup_scale_qk_dot_by_d is false, but other muP scales are not 1; muP must be entirely on or off; "
                "choose another folder"
            )
        return None
    if base_hidden_size < 1 or abs(width_scale * hf_config["n_embd"] - base_hidden_size) > 1e-6 * base_hidden_size:
        raise UserError(
            f"config.json: mup_width_scale {width_scale} times n_embd {hf_config['n_embd']} is the base width of "
            "muP, which must be a positive whole number; correct mup_width_scale"
        )
    multipliers = {"embedding_multiplier": embeddings_scale, "output_multiplier": output_alpha}
    return {"base_hidden_size": base_hidden_size, **multipliers}


def _norm_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    for suffix in ("weight", "bias"):
        yield identity_mapping(f"{prefix}.{suffix}", f"{hf_prefix}.{suffix}", model.hidden_size)


def _linear_mappings(prefix: str, hf_prefix: str, outputs: int, inputs: int) -> Iterator[TensorMapping]:
    shape, matrix = (outputs, inputs), HFTensor(f"{hf_prefix}.weight", (inputs, outputs), is_transposed=True)
    yield TensorMapping(f"{prefix}.weight", shape, shape, (matrix,))
    yield identity_mapping(f"{prefix}.bias", f"{hf_prefix}.bias", outputs)


def _qkv_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    """Our tensor is grouped by head, the folder's by query, key and value."""
    inputs, outputs, view = model.hidden_size, 3 * model.hidden_size, (model.num_heads, 3, model.head_dim)
    matrix = HFTensor(f"{hf_prefix}.weight", (inputs, outputs), permutation=(1, 0, 2, 3), is_transposed=True)
    yield TensorMapping(f"{prefix}.weight", (outputs, inputs), (*view, inputs), (matrix,))
    bias = HFTensor(f"{hf_prefix}.bias", (outputs,), permutation=(1, 0, 2))
    yield TensorMapping(f"{prefix}.bias", (outputs,), view, (bias,))


def _gate_up_mappings(model: BTLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    inputs, outputs = model.hidden_size, model.ffn_hidden_size
    matrices, biases = ([f"{hf_prefix}.{layer}.{kind}" for layer in ("c_fc2", "c_fc")] for kind in ("weight", "bias"))
    yield stacked_mapping(f"{prefix}.weight", matrices, outputs, inputs, is_transposed=True)
    yield stacked_mapping(f"{prefix}.bias", biases, outputs)
