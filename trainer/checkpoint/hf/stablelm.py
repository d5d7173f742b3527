"""Stable LM 2 in the format of transformers' `StableLmForCausalLM`: its tensors and the fields of config.json.

In that class, block and final norms always have a bias, so a model without norm biases is exported with zeros. Norms of single
heads never have a bias. Source: transformers 5.23 `models/stablelm/`, config.json of stablelm-2-12b.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tandem.trainer.checkpoint.hf.config_fields import (
    REMEDY,
    Count,
    Positive,
    SharedFields,
    check_divisible,
    parse_fields,
)
from tandem.trainer.checkpoint.hf.tensor_mapping import HFTensor, TensorMapping, identity_mapping, stacked_mapping
from tandem.trainer.config import MupConfig, StableLMConfig, UserError
from tandem.trainer.config.constraints import Range

EMBEDDING_NAME, HEAD_NAME, BASE_PREFIX = "model.embed_tokens.weight", "lm_head.weight", "model."
FIXED_FIELDS = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0, "rotary_scaling_factor": 1.0}
"""Published fields for which we support only one value."""
ARCHITECTURES = ("StableLmForCausalLM", "StableLmModel", "StableLMEpochForCausalLM", "StableLMEpochModel")
ALIASES = {
    "norm_eps": "layer_norm_eps",
    "rope_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
"""Names in the first revisions of the folders (model_type stablelm_epoch) -> the later ones."""
DUPLICATES = {
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
} | dict.fromkeys(
    ("max_seq_len", "max_seq_length", "max_sequence_length", "n_ctx", "n_positions", "seq_len", "seq_length"),
    "max_position_embeddings",
)
"""Names in other models' configs -> the published ones. The class ignores them, so they count only beside a published one."""
MAX_SEQ_LEN_FIELD = "max_position_embeddings"
SHAPE_FIELDS = {
    "embed_tokens.": "vocab_size, hidden_size",
    "lm_head.": "vocab_size, hidden_size",
    ".mlp.": "intermediate_size, hidden_size",
    "self_attn.k_": "num_key_value_heads, num_attention_heads, hidden_size",
    "self_attn.v_": "num_key_value_heads, num_attention_heads, hidden_size",
    "": "hidden_size, num_attention_heads",
}
"""Part of a tensor's name -> the fields that determine its shape. The first that matches counts."""
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
MUP_FIELDS: dict[str, str] = {}
"""Maps our fields of muP to the published ones: none, because the class has no multipliers."""
CODE_FILES: tuple[str, ...] = ()
"""Code files copied into an export: none, because transformers has the class."""


@dataclass(frozen=True)
class Rotary:
    """The rotary fields, which config.json may have at its top level, in `rope_scaling` and in `rope_parameters`."""

    rope_theta: Annotated[float, Range(above=1)] | None = None
    partial_rotary_factor: Annotated[float, Range(above=0, at_most=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Fields(SharedFields):
    """The keys of config.json that are read."""

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count
    max_position_embeddings: Count | None = None
    layer_norm_eps: Positive = 1e-5
    use_parallel_residual: bool = False
    qk_layernorm: bool = False
    use_qkv_bias: bool = False
    use_norm_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: Any = None
    partial_rotary_factor: Any = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


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


def from_hf_config(fields: Fields, path: Path) -> tuple[dict[str, Any], None]:
    """Return the model and muP sections for a config.json, without the fields that the published schema lacks.

    Raises: UserError for rotary scaling, and for rotary fields that contradict one another.
    """
    check_divisible(path, fields, "hidden_size", "num_attention_heads", "num_key_value_heads")
    rotary, keys = _merge_rotary(fields, path)
    model = {"family": "stablelm"} | {ours: getattr(fields, theirs) for ours, theirs in MODEL_FIELDS.items()}
    model["num_kv_heads"] = fields.num_key_value_heads or fields.num_attention_heads
    model["partial_rotary_factor"] = rotary.partial_rotary_factor or 0.25
    model["rotary_base"] = rotary.rope_theta or 10_000
    head_dim = fields.hidden_size // fields.num_attention_heads
    if fields.head_dim not in (None, head_dim):
        raise UserError(
            f"{path}: head_dim is {fields.head_dim}, but hidden_size {fields.hidden_size} / num_attention_heads "
            f"{fields.num_attention_heads} is {head_dim}; {REMEDY}"
        )
    if (rotated := int(head_dim * model["partial_rotary_factor"])) < 2 or rotated % 2:
        raise UserError(
            f"{path}: {keys.get('partial_rotary_factor', 'partial_rotary_factor')} {model['partial_rotary_factor']} rotates "
            f"{rotated} of {head_dim} dims of a head, which is not an even number; {REMEDY}"
        )
    return model, None


def _merge_rotary(fields: Fields, path: Path) -> tuple[Rotary, dict[str, str]]:
    """Return the rotary fields of all three places, and the key under which config.json has each."""
    top_level = {name: getattr(fields, name) for name in ("rope_theta", "partial_rotary_factor")}
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for place, tree in {
        "": top_level,
        "rope_parameters.": fields.rope_parameters,
        "rope_scaling.": fields.rope_scaling,
    }.items():
        for key, value in (tree or {}).items():
            name = "rope_type" if key == "type" else key  # the name before rope_type
            if value is None:
                continue
            if isinstance(value, dict):
                problem = (
                    f"{place}{key} is {repr(value)[:60]}, but only one set of rotary fields for all layers is supported"
                )
                names = ", ".join(f"{place}{each}" for each in ("rope_type", *Rotary.__dataclass_fields__))
                raise UserError(f"{path}: {problem}: {names}; write them, or choose another folder")
            if merged.setdefault(name, value) != value:
                problem = f"{place}{key} is {value!r}, but {origins[name]} is {merged[name]!r}, and both mean the same"
                raise UserError(f"{path}: {problem}; remove the wrong one")
            origins.setdefault(name, place + key if place else fields.key(key))
    for name, supported in (("rope_type", "default"), ("factor", 1.0)):
        if merged.pop(name, supported) != supported:
            problem = f"{origins[name]} is not {supported}, but scaled rotary positions are not supported"
            raise UserError(f"{path}: {problem}; choose a folder without them")
    rotary: Rotary = parse_fields(Rotary, merged, path, origins)
    return rotary, origins


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
