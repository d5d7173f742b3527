"""Configuration of BTLM for transformers. Copied into every export, so it does not import the trainer."""

from transformers import PreTrainedConfig

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


class BTLMConfig(PreTrainedConfig):
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

    def __init__(
        self,
        vocab_size: int = 50_257,
        n_positions: int = 8_192,
        n_embd: int = 2_560,
        n_layer: int = 32,
        n_head: int = 32,
        n_inner: int = 6_826,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.073,
        mup_width_scale: float = 1.0,
        mup_embeddings_scale: float = 1.0,
        mup_output_alpha: float = 1.0,
        mup_scale_qk_dot_by_d: bool = False,
        alibi_scaling=None,  # not annotated: check_alibi_scaling has the better message
        use_cache: bool = True,
        bos_token_id: int | None = 50_256,
        eos_token_id: int | None = 50_256,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **others,
    ) -> None:
        check_alibi_scaling(alibi_scaling)
        self.vocab_size, self.n_positions, self.n_embd, self.n_inner = vocab_size, n_positions, n_embd, n_inner
        self.n_layer, self.n_head, self.layer_norm_epsilon = n_layer, n_head, layer_norm_epsilon
        self.initializer_range, self.alibi_scaling, self.use_cache = initializer_range, alibi_scaling, use_cache
        self.mup_width_scale, self.mup_embeddings_scale = mup_width_scale, mup_embeddings_scale
        self.mup_output_alpha, self.mup_scale_qk_dot_by_d = mup_output_alpha, mup_scale_qk_dot_by_d
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        for name, value in SUPPORTED_VALUES.items():
            if others.setdefault(name, value) != value:
                raise ValueError(f"{name}: {others[name]!r} is not supported; use {value!r}")
        super().__init__(**others)
