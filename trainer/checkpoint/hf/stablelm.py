"""Stable LM 2 as transformers' own `StableLmForCausalLM` has it: table of tensors and fields of config.json.

Block and final norms always carry a bias there, so a model without norm biases is written with zeros; norms
of single heads never do. Source: transformers 5.23 `models/stablelm/`, config.json of stablelm-2-12b.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping
from tandem.trainer.config import MupConfig, StableLMConfig, UserError

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
MAX_SEQ_LEN_FIELD = "max_position_embeddings"
CODE_FILES: tuple[str, ...] = ()
"""Files of code shipped in an export: none, transformers has the class."""


def tensor_mappings(model: StableLMConfig) -> Iterator[TensorMapping]:
    """The row of every tensor of the model, from the embedding to the head."""
    hidden_size, ffn_hidden_size = model.hidden_size, model.ffn_hidden_size
    yield identity_mapping("embedding.weight", EMBEDDING_NAME, model.vocab_size, hidden_size)
    for index in range(model.num_layers):
        prefix, hf_prefix = f"layers.{index}", f"model.layers.{index}"
        yield from _norm_mappings(model, f"{prefix}.attention_norm", f"{hf_prefix}.input_layernorm")
        yield _qkv_mapping(model, f"{prefix}.attention.qkv.weight", hf_prefix, "weight", (hidden_size,))
        if model.qkv_bias:
            yield _qkv_mapping(model, f"{prefix}.attention.qkv.bias", hf_prefix, "bias", ())
        if model.qk_layernorm:
            yield _head_norm_mapping(
                f"{prefix}.attention.query_norm.weight", f"{hf_prefix}.self_attn.q_layernorm", model.num_heads, model
            )
            yield _head_norm_mapping(
                f"{prefix}.attention.key_norm.weight", f"{hf_prefix}.self_attn.k_layernorm", model.num_kv_heads, model
            )
        yield identity_mapping(
            f"{prefix}.attention.out.weight", f"{hf_prefix}.self_attn.o_proj.weight", hidden_size, hidden_size
        )
        if not model.parallel_residual:
            yield from _norm_mappings(model, f"{prefix}.ffn_norm", f"{hf_prefix}.post_attention_layernorm")
        shape = (2, ffn_hidden_size, hidden_size)
        hf_names = (f"{hf_prefix}.mlp.gate_proj.weight", f"{hf_prefix}.mlp.up_proj.weight")
        pieces = tuple(HFTensor(name, (ffn_hidden_size, hidden_size), (which,)) for which, name in enumerate(hf_names))
        yield TensorMapping(f"{prefix}.ffn.gate_up.weight", shape, shape, pieces)
        yield identity_mapping(
            f"{prefix}.ffn.down.weight", f"{hf_prefix}.mlp.down_proj.weight", hidden_size, ffn_hidden_size
        )
    yield from _norm_mappings(model, "final_norm", "model.norm")
    if not model.tie_word_embeddings:
        yield identity_mapping("head.weight", HEAD_NAME, model.vocab_size, hidden_size)


def default_tensors(model: StableLMConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the class has although the model need not: the biases of its block and final norms, zero."""
    norms = ["input_layernorm"] if model.parallel_residual else ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{index}.{norm}.bias" for index in range(model.num_layers) for norm in norms]
    return {name: torch.zeros(model.hidden_size, dtype=dtype) for name in [*names, "model.norm.bias"]}


def to_hf_config(model: StableLMConfig, mup: MupConfig | None, max_seq_len: int) -> dict[str, Any]:
    """config.json: the published fields, and the rotary ones a second time as transformers 5 spells them.

    Raises: UserError where muP is on, for which the published class has no multipliers.
    """
    if mup is not None:
        raise UserError("mup: is set; a Stable LM folder has no place for its multipliers; export a run with mup: null")
    rotary = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.partial_rotary_factor}
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "layer_norm_eps": model.norm_eps,
        "max_position_embeddings": max_seq_len,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "qk_layernorm": model.qk_layernorm,
        **rotary,
        "rope_parameters": {"rope_type": "default", **rotary},
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "use_norm_bias": model.norm_bias,
        "use_parallel_residual": model.parallel_residual,
        "use_qkv_bias": model.qkv_bias,
        "vocab_size": model.vocab_size,
    }


def from_hf_config(hf_config: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """The model and muP sections of a config.json, as plain trees without what the published schema lacks.

    Raises: UserError for rotary scaling and other activations, KeyError where a required field is missing.
    """
    rotary = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    fraction = hf_config.get("partial_rotary_factor", hf_config.get("rope_pct", 0.25))  # the second in early revisions
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" or hf_config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: rope_type {kind!r}, hidden_act {hf_config.get('hidden_act')!r}; Stable LM 2 has "
            "default and silu; choose another folder"
        )
    model = {
        "family": "stablelm",
        "hidden_size": hf_config["hidden_size"],
        "num_layers": hf_config["num_hidden_layers"],
        "num_heads": hf_config["num_attention_heads"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "vocab_size": hf_config["vocab_size"],
        "norm_eps": hf_config.get("layer_norm_eps", hf_config.get("norm_eps", 1e-5)),
        "init_std": hf_config.get("initializer_range", 0.02),
        "num_kv_heads": hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"],
        "partial_rotary_factor": rotary.get("partial_rotary_factor", fraction),
        "rotary_base": rotary.get("rope_theta", hf_config.get("rope_theta", 10_000)),
        "parallel_residual": hf_config.get("use_parallel_residual", False),
        "qk_layernorm": hf_config.get("qk_layernorm", False),
        "qkv_bias": hf_config.get("use_qkv_bias", False),
        "norm_bias": hf_config.get("use_norm_bias", False),
        "tie_word_embeddings": hf_config.get("tie_word_embeddings", False),
    }
    return model, None


def _norm_mappings(model: StableLMConfig, prefix: str, hf_prefix: str) -> Iterator[TensorMapping]:
    yield identity_mapping(f"{prefix}.weight", f"{hf_prefix}.weight", model.hidden_size)
    if model.norm_bias:
        yield identity_mapping(f"{prefix}.bias", f"{hf_prefix}.bias", model.hidden_size)


def _qkv_mapping(
    model: StableLMConfig, name: str, hf_prefix: str, suffix: str, inputs: tuple[int, ...]
) -> TensorMapping:
    """Ours is grouped by key head: its query heads, it, its value head. Theirs are three tensors."""
    group, head_dim = model.num_heads // model.num_kv_heads, model.head_dim
    pieces = tuple(
        HFTensor(
            f"{hf_prefix}.self_attn.{projection}_proj.{suffix}", (heads * head_dim, *inputs), (slice(None), group_index)
        )
        for projection, heads, group_index in (
            ("q", model.num_heads, slice(group)),
            ("k", model.num_kv_heads, group),
            ("v", model.num_kv_heads, group + 1),
        )
    )
    features = model.num_kv_heads * (group + 2) * head_dim
    return TensorMapping(name, (features, *inputs), (model.num_kv_heads, group + 2, head_dim, *inputs), pieces)


def _head_norm_mapping(name: str, hf_prefix: str, num_heads: int, model: StableLMConfig) -> TensorMapping:
    shape = (num_heads, model.head_dim)
    pieces = (HFTensor(f"{hf_prefix}.norms.{head}.weight", (model.head_dim,), (head,)) for head in range(num_heads))
    return TensorMapping(name, shape, shape, tuple(pieces))
