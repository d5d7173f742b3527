"""Stable LM 2 as transformers' own `StableLmForCausalLM` has it: table of tensors and fields of config.json.

Block and final norms always carry a bias there, so a model without norm biases is written with zeros; norms
of single heads never do. Source: transformers 5.23 `models/stablelm/`, config.json of stablelm-2-12b.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tandem.trainer.checkpoint.hf.tensor_mapping import Piece, Row, whole
from tandem.trainer.config import Mup, StableLM, UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_SEQ_LEN = "max_position_embeddings"
CODE: tuple[str, ...] = ()
"""Files of code shipped in an export: none, transformers has the class."""


def rows(model: StableLM) -> Iterator[Row]:
    """The row of every tensor of the model, from the embedding to the head."""
    width, ffn_width = model.width, model.ffn_width
    yield whole("embedding.weight", EMBEDDING, model.vocab, width)
    for index in range(model.depth):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        yield from _norm(model, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        yield _qkv(model, f"{ours}.attention.qkv.weight", theirs, "weight", (width,))
        if model.qkv_bias:
            yield _qkv(model, f"{ours}.attention.qkv.bias", theirs, "bias", ())
        if model.qk_norm:
            yield _head_norms(
                f"{ours}.attention.query_norm.weight", f"{theirs}.self_attn.q_layernorm", model.heads, model
            )
            yield _head_norms(
                f"{ours}.attention.key_norm.weight", f"{theirs}.self_attn.k_layernorm", model.kv_heads, model
            )
        yield whole(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight", width, width)
        if not model.parallel_residual:
            yield from _norm(model, f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
        shape = (2, ffn_width, width)
        names = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        pieces = tuple(Piece(name, (ffn_width, width), (which,)) for which, name in enumerate(names))
        yield Row(f"{ours}.ffn.gate_up.weight", shape, shape, pieces)
        yield whole(f"{ours}.ffn.down.weight", f"{theirs}.mlp.down_proj.weight", width, ffn_width)
    yield from _norm(model, "final_norm", "model.norm")
    if not model.tied_head:
        yield whole("head.weight", HEAD, model.vocab, width)


def defaults(model: StableLM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the class has although the model need not: the biases of its block and final norms, zero."""
    norms = ["input_layernorm"] if model.parallel_residual else ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{index}.{norm}.bias" for index in range(model.depth) for norm in norms]
    return {name: torch.zeros(model.width, dtype=dtype) for name in [*names, "model.norm.bias"]}


def fields(model: StableLM, mup: Mup | None, max_seq_len: int) -> dict[str, Any]:
    """config.json: the published fields, and the rotary ones a second time as transformers 5 spells them.

    Raises: UserError where muP is on, for which the published class has no multipliers.
    """
    if mup is not None:
        raise UserError("mup: is set; a Stable LM folder has no place for its multipliers; export a run with mup: null")
    rotary = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_fraction}
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "hidden_act": "silu",
        "hidden_size": model.width,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_width,
        "layer_norm_eps": model.norm_epsilon,
        "max_position_embeddings": max_seq_len,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.depth,
        "num_key_value_heads": model.kv_heads,
        "qk_layernorm": model.qk_norm,
        **rotary,
        "rope_parameters": {"rope_type": "default", **rotary},
        "tie_word_embeddings": model.tied_head,
        "use_cache": True,
        "use_norm_bias": model.norm_bias,
        "use_parallel_residual": model.parallel_residual,
        "use_qkv_bias": model.qkv_bias,
        "vocab_size": model.vocab,
    }


def section(given: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """The model and muP sections of a config.json, as plain trees without what the published schema lacks.

    Raises: UserError for rotary scaling and other activations, KeyError where a required field is missing.
    """
    rotary = given.get("rope_parameters") or given.get("rope_scaling") or {}
    fraction = given.get("partial_rotary_factor", given.get("rope_pct", 0.25))  # the second in early revisions
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" or given.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: rope_type {kind!r}, hidden_act {given.get('hidden_act')!r}; Stable LM 2 has "
            "default and silu; choose another folder"
        )
    model = {
        "family": "stablelm",
        "width": given["hidden_size"],
        "depth": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "ffn_width": given["intermediate_size"],
        "vocab": given["vocab_size"],
        "norm_epsilon": given.get("layer_norm_eps", given.get("norm_eps", 1e-5)),
        "init_std": given.get("initializer_range", 0.02),
        "kv_heads": given.get("num_key_value_heads") or given["num_attention_heads"],
        "rotary_fraction": rotary.get("partial_rotary_factor", fraction),
        "rotary_base": rotary.get("rope_theta", given.get("rope_theta", 10_000)),
        "parallel_residual": given.get("use_parallel_residual", False),
        "qk_norm": given.get("qk_layernorm", False),
        "qkv_bias": given.get("use_qkv_bias", False),
        "norm_bias": given.get("use_norm_bias", False),
        "tied_head": given.get("tie_word_embeddings", False),
    }
    return model, None


def _norm(model: StableLM, ours: str, theirs: str) -> Iterator[Row]:
    yield whole(f"{ours}.weight", f"{theirs}.weight", model.width)
    if model.norm_bias:
        yield whole(f"{ours}.bias", f"{theirs}.bias", model.width)


def _qkv(model: StableLM, ours: str, theirs: str, suffix: str, inputs: tuple[int, ...]) -> Row:
    """Ours is grouped by key head: its query heads, it, its value head. Theirs are three tensors."""
    group, head_dim = model.heads // model.kv_heads, model.head_dim
    pieces = tuple(
        Piece(f"{theirs}.self_attn.{name}_proj.{suffix}", (heads * head_dim, *inputs), (slice(None), which))
        for name, heads, which in (
            ("q", model.heads, slice(group)),
            ("k", model.kv_heads, group),
            ("v", model.kv_heads, group + 1),
        )
    )
    features = model.kv_heads * (group + 2) * head_dim
    return Row(ours, (features, *inputs), (model.kv_heads, group + 2, head_dim, *inputs), pieces)


def _head_norms(ours: str, theirs: str, heads: int, model: StableLM) -> Row:
    shape = (heads, model.head_dim)
    pieces = (Piece(f"{theirs}.norms.{head}.weight", (model.head_dim,), (head,)) for head in range(heads))
    return Row(ours, shape, shape, tuple(pieces))
