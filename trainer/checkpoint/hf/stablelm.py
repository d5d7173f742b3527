"""Stable LM 2 in the format of transformers' `StableLmForCausalLM`: its tensors and the fields of config.json.

In that class, block and final norms always have a bias, so a model without norm biases is exported with zeros. Norms of single
heads never have a bias. Source: transformers 5.23 `models/stablelm/`, config.json of stablelm-2-12b.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping, stacked_mapping
from tandem.trainer.config import MupConfig, StableLMConfig, UserError

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
MAX_SEQ_LEN_FIELD = "max_position_embeddings"
MODEL_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
    "parallel_residual": "use_parallel_residual",
    "qk_layernorm": "qk_layernorm",
    "qkv_bias": "use_qkv_bias",
    "norm_bias": "use_norm_bias",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Maps our fields to the published ones."""
FALSE_BY_DEFAULT = ("use_parallel_residual", "qk_layernorm", "use_qkv_bias", "use_norm_bias", "tie_word_embeddings")
CODE_FILES: tuple[str, ...] = ()
"""Code files copied into an export: none, because transformers has the class."""


def tensor_mappings(model: StableLMConfig) -> Iterator[TensorMapping]:
    """Map every tensor of the model, from the embedding to the head."""
    hidden_size, ffn_hidden_size = model.hidden_size, model.ffn_hidden_size
    yield identity_mapping("embedding.weight", EMBEDDING_NAME, model.vocab_size, hidden_size)
    for index in range(model.num_layers):
        prefix, hf_prefix = f"layers.{index}", f"model.layers.{index}"
        yield from _norm_mappings(model, f"{prefix}.attention_norm", f"{hf_prefix}.input_layernorm")
        yield _qkv_mapping(model, f"{prefix}.attention.qkv.weight", hf_prefix, "weight", (hidden_size,))
        if model.qkv_bias:
            yield _qkv_mapping(model, f"{prefix}.attention.qkv.bias", hf_prefix, "bias", ())
        if model.qk_layernorm:
            for ours, theirs, num_heads in (("query", "q", model.num_heads), ("key", "k", model.num_kv_heads)):
                hf_norms = f"{hf_prefix}.self_attn.{theirs}_layernorm.norms"
                hf_names = [f"{hf_norms}.{head}.weight" for head in range(num_heads)]
                yield stacked_mapping(f"{prefix}.attention.{ours}_norm.weight", hf_names, model.head_dim)
        hf_out = f"{hf_prefix}.self_attn.o_proj.weight"
        yield identity_mapping(f"{prefix}.attention.out.weight", hf_out, hidden_size, hidden_size)
        if not model.parallel_residual:
            yield from _norm_mappings(model, f"{prefix}.ffn_norm", f"{hf_prefix}.post_attention_layernorm")
        hf_gate_up = [f"{hf_prefix}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        yield stacked_mapping(f"{prefix}.ffn.gate_up.weight", hf_gate_up, ffn_hidden_size, hidden_size)
        hf_down = f"{hf_prefix}.mlp.down_proj.weight"
        yield identity_mapping(f"{prefix}.ffn.down.weight", hf_down, hidden_size, ffn_hidden_size)
    yield from _norm_mappings(model, "final_norm", "model.norm")
    if not model.tie_word_embeddings:
        yield identity_mapping("head.weight", HEAD_NAME, model.vocab_size, hidden_size)


def default_tensors(model: StableLMConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the tensors that the class needs even if the model has none: zero biases of the block and final norms."""
    norms = ["input_layernorm"] if model.parallel_residual else ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{index}.{norm}.bias" for index in range(model.num_layers) for norm in norms]
    return {name: torch.zeros(model.hidden_size, dtype=dtype) for name in [*names, "model.norm.bias"]}


def to_hf_config(model: StableLMConfig, mup: MupConfig | None, max_seq_len: int) -> dict[str, Any]:
    """Build config.json. The rotary fields are also present in the form that transformers 5 uses.

    Raises: UserError if muP is on, because the published class has no multipliers.
    """
    if mup is not None:
        raise UserError("mup: is set, but a Stable LM folder cannot store its multipliers; export a run with mup: null")
    rotary = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.partial_rotary_factor}
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "hidden_act": "silu",
        "max_position_embeddings": max_seq_len,
        **rotary,
        "rope_parameters": {"rope_type": "default", **rotary},
        "use_cache": True,
        **{theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()},
    }


def from_hf_config(hf_config: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """Return the model and muP sections for a config.json, without the fields that the published schema lacks.

    Raises: UserError for rotary scaling and other activations. KeyError if a required field is missing.
    """
    rotary = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    fraction = hf_config.get("partial_rotary_factor", hf_config.get("rope_pct", 0.25))  # rope_pct in early revisions
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" or hf_config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: rope_type is {kind!r} and hidden_act is {hf_config.get('hidden_act', 'silu')!r}, but Stable LM 2 "
            "needs 'default' and 'silu'; choose another folder"
        )
    fields: dict[str, Any] = {"initializer_range": 0.02, "num_key_value_heads": None}
    fields["layer_norm_eps"] = hf_config.get("norm_eps", 1e-5)  # norm_eps in early revisions
    fields |= dict.fromkeys(FALSE_BY_DEFAULT, False) | hf_config
    model = {"family": "stablelm"} | {ours: fields[theirs] for ours, theirs in MODEL_FIELDS.items()}
    model["num_kv_heads"] = model["num_kv_heads"] or model["num_heads"]
    model["partial_rotary_factor"] = rotary.get("partial_rotary_factor", fraction)
    model["rotary_base"] = rotary.get("rope_theta", hf_config.get("rope_theta", 10_000))
    return model, None


def _norm_mappings(model: StableLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    yield identity_mapping(f"{prefix}.weight", f"{hf_prefix}.weight", model.hidden_size)
    if model.norm_bias:
        yield identity_mapping(f"{prefix}.bias", f"{hf_prefix}.bias", model.hidden_size)


def _qkv_mapping(
    model: StableLMConfig, name: str, hf_prefix: str, suffix: str, inputs: tuple[int, ...]
) -> TensorMapping:
    """Our tensor is grouped by key head: its query heads, the key head, and its value head. The folder has three tensors."""
    kv_heads, head_dim, group = model.num_kv_heads, model.head_dim, model.num_heads // model.num_kv_heads
    projections = (("q", model.num_heads, slice(group)), ("k", kv_heads, group), ("v", kv_heads, group + 1))
    parts = tuple(
        HFTensor(f"{hf_prefix}.self_attn.{letter}_proj.{suffix}", (heads * head_dim, *inputs), (slice(None), index))
        for letter, heads, index in projections
    )
    features = kv_heads * (group + 2) * head_dim
    return TensorMapping(name, (features, *inputs), (kv_heads, group + 2, head_dim, *inputs), parts)
