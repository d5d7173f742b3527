"""BTLM in the format of cerebras/btlm-3b-8k-base: its tensors and the fields of config.json.

Matrices are stored [in, out]. Query, key and value are one tensor, in that order. `c_fc` is the value and `c_fc2` the gate of
SwiGLU. transformers has no BTLM class, so an export includes `modeling_btlm.py` and `configuration_btlm.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.trainer.checkpoint.hf.config_fields import Count, Positive, SharedFields, check_divisible
from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping, stacked_mapping
from tandem.trainer.config import AlibiScalingConfig, BTLMConfig, MupConfig, UserError, check_alibi_scaling

EMBEDDING_NAME, HEAD_NAME, BASE_PREFIX = "transformer.wte.weight", "lm_head.weight", "transformer."
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
ARCHITECTURES = ("BTLMLMHeadModel", "BTLMModel")
ALIASES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "n_ctx": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names of published fields. Source: `attribute_map` of the published class, and GPT-2's config."""
DUPLICATES = {
    "d_model": "n_embd",
    "ffn_hidden_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "num_heads": "n_head",
    "num_key_value_heads": "n_head",
    "num_layers": "n_layer",
} | dict.fromkeys(
    ("max_seq_len", "max_seq_length", "max_sequence_length", "seq_len", "seq_length"),
    "n_positions",
)
"""Names in other models' configs -> the published ones. The class ignores them, so they count only beside a published one."""
SHAPE_FIELDS = {
    "wte.": "vocab_size, n_embd",
    "lm_head.": "vocab_size, n_embd",
    ".mlp.": "n_inner, n_embd",
    "": "n_embd",
}
"""Part of a tensor's name -> the fields that determine its shape. The first that matches counts."""
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
MUP_FIELDS = {
    "base_hidden_size": "mup_width_scale",
    "embedding_multiplier": "mup_embeddings_scale",
    "output_multiplier": "mup_output_alpha",
    "scale_qk_dot_by_d": "mup_scale_qk_dot_by_d",
}
"""Maps our fields of muP to the published ones from which they are computed."""


@dataclass(frozen=True, kw_only=True)
class Fields(SharedFields):
    """The keys of config.json that are read."""

    n_embd: Count
    n_layer: Count
    n_head: Count
    n_inner: Count | None = None
    n_positions: Count | None = None
    layer_norm_epsilon: Positive = 1e-5
    tie_word_embeddings: bool = True
    alibi_scaling: AlibiScalingConfig | None = None
    mup_width_scale: Positive = 1.0
    mup_embeddings_scale: Positive = 1.0
    mup_output_alpha: Positive = 1.0
    mup_scale_qk_dot_by_d: bool = False


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
        "mup_scale_qk_dot_by_d": mup is not None and mup.scale_qk_dot_by_d,
        "mup_width_scale": mup.base_hidden_size / model.hidden_size if mup else 1.0,
        "n_positions": max_seq_len,
        "use_cache": True,
        **{theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()},
        **FIXED_FIELDS,
    }


def from_hf_config(fields: Fields, path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the model and muP sections for a config.json, without the fields that the published schema lacks.

    Raises: UserError if the position interpolation is not valid.
    """
    check_divisible(path, fields, "n_embd", "n_head")
    scaling = fields.alibi_scaling
    if scaling is not None:
        check_alibi_scaling(scaling, f"{path}: alibi_scaling")
        if fields.n_positions is not None and (scaling.train_seq_len or 0) > fields.n_positions:
            raise UserError(
                f"{path}: alibi_scaling.train_seq_len is {scaling.train_seq_len}, but {fields.key('n_positions')}, the longest "
                f"row, is only {fields.n_positions}; raise it, or remove alibi_scaling"
            )
    model = {ours: getattr(fields, theirs) for ours, theirs in MODEL_FIELDS.items()}
    model["ffn_hidden_size"] = fields.n_inner or 4 * fields.n_embd  # as in GPT-2
    return {"family": "btlm", **model, "alibi_scaling": scaling and asdict(scaling)}, _mup_from_hf(fields)


def _mup_from_hf(fields: Fields) -> dict[str, Any] | None:
    scales = (fields.mup_width_scale, fields.mup_embeddings_scale, fields.mup_output_alpha)
    if not fields.mup_scale_qk_dot_by_d and scales == (1.0, 1.0, 1.0):
        return None
    base = fields.mup_width_scale * fields.n_embd
    return {
        "base_hidden_size": round(base) if math.isclose(base, round(base), rel_tol=1e-9) else base,
        "embedding_multiplier": fields.mup_embeddings_scale,
        "output_multiplier": fields.mup_output_alpha,
        "scale_qk_dot_by_d": fields.mup_scale_qk_dot_by_d,
    }


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
