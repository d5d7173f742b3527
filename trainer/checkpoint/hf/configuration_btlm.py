"""Configuration of BTLM for transformers 4.57 and 5. Copied into every export, so it does not import the trainer."""

from typing import Any

from transformers import PretrainedConfig

SUPPORTED_VALUES = {
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "position_embedding_type": "alibi",
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
"""Published fields for which this implementation supports only one value."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_257,
    "n_positions": 8_192,
    "n_embd": 2_560,
    "n_layer": 32,
    "n_head": 32,
    "n_inner": 6_826,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.073,
    "mup_width_scale": 1.0,
    "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0,
    "mup_scale_qk_dot_by_d": False,
    "alibi_scaling": None,
    "use_cache": True,
    "bos_token_id": 50_256,
    "eos_token_id": 50_256,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
"""The other published fields."""


def check_alibi_scaling(scaling) -> None:
    """Raise ValueError unless `scaling` is None, or has `type` "linear" and a `factor` or `train_seq_len` above 1."""
    if scaling is None:
        return
    number: dict[str, type[float] | type[int]] = {"factor": float, "train_seq_len": int}
    if not isinstance(scaling, dict) or len(scaling) != 2 or "type" not in scaling or not set(scaling) & set(number):
        raise ValueError(
            f"alibi_scaling: {scaling!r} is not valid; give two keys: type, and either factor or train_seq_len"
        )
    if scaling["type"] != "linear":
        raise ValueError(f"alibi_scaling: type {scaling['type']!r} is not supported; use 'linear'")
    for key, kind in number.items():
        value = scaling.get(key, kind(2))
        if type(value) is not kind or not 1 < value < float("inf"):
            raise ValueError(f"alibi_scaling: {key} {value!r} is not valid; use a finite {kind.__name__} above 1")


class BTLMConfig(PretrainedConfig):
    """The fields of cerebras/btlm-3b-8k-base, with its values as defaults.

    Embeddings are multiplied by `mup_embeddings_scale`, logits by `mup_output_alpha * mup_width_scale`. With
    `mup_scale_qk_dot_by_d`, attention scores are multiplied by 1 / head_dim instead of 1 / sqrt(head_dim).

    `alibi_scaling` divides the ALiBi slopes, for rows longer than those in training. Raise `n_positions` to match.
    * {"type": "linear", "factor": 4.0} divides by 4.
    * {"type": "linear", "train_seq_len": 8192} divides by length / 8192 in rows longer than 8192 tokens.
    """

    model_type = "btlm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  (transformers reads it as a plain class attribute)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(self, **fields) -> None:
        check_alibi_scaling(fields.get("alibi_scaling"))
        fields = DEFAULTS | fields
        for name, value in SUPPORTED_VALUES.items():
            if fields.setdefault(name, value) != value:
                raise ValueError(f"{name}: {fields[name]!r} is not supported; use {value!r}")
        for name in DEFAULTS:
            setattr(self, name, fields[name])
        # In transformers 4.57, the base class resets its own fields (ids of tokens, tie_word_embeddings) that it is not given.
        super().__init__(**fields)
