"""Configuration of BTLM for transformers; shipped in every export, so it imports nothing of the trainer."""

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
"""Fields of the published schema that this implementation supports at one value."""


def check_alibi_scaling(scaling) -> None:
    """Raises ValueError unless it is None, or `type` "linear" beside a `factor` or a `train_seq_len` above 1."""
    if scaling is None:
        return
    number: dict[str, type[float] | type[int]] = {"factor": float, "train_seq_len": int}
    if not isinstance(scaling, dict) or len(scaling) != 2 or "type" not in scaling or not set(scaling) & set(number):
        raise ValueError(f"alibi_scaling: {scaling!r}; has exactly two keys, type and one of factor and train_seq_len")
    if scaling["type"] != "linear":
        raise ValueError(f"alibi_scaling: type {scaling['type']!r}; must be 'linear'")
    for key, kind in number.items():
        value = scaling.get(key, kind(2))
        if type(value) is not kind or not 1 < value < float("inf"):
            raise ValueError(f"alibi_scaling: {key} {value!r}; must be {kind.__name__} and above 1")


class BTLMConfig(PreTrainedConfig):
    """Fields as published for cerebras/btlm-3b-8k-base, whose values are the defaults.

    Embeddings are multiplied by mup_embeddings_scale, logits by mup_output_alpha * mup_width_scale; with
    mup_scale_qk_dot_by_d the attention's scale is 1 / head_dim instead of its root. `alibi_scaling` divides
    ALiBi's slopes: {"type": "linear", "factor": 4.0} by 4, {"type": "linear", "train_seq_len": 8192} by
    length / 8192 in rows that are longer than that; raise n_positions with it.
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
        alibi_scaling=None,  # what it must be is checked below
        use_cache: bool = True,
        bos_token_id: int | None = 50_256,
        eos_token_id: int | None = 50_256,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **others,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.mup_width_scale = mup_width_scale
        self.mup_embeddings_scale = mup_embeddings_scale
        self.mup_output_alpha = mup_output_alpha
        self.mup_scale_qk_dot_by_d = mup_scale_qk_dot_by_d
        self.alibi_scaling = alibi_scaling
        check_alibi_scaling(alibi_scaling)
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        for name, value in SUPPORTED_VALUES.items():
            if others.setdefault(name, value) != value:
                raise ValueError(f"{name}: {others[name]!r}; this BTLM supports only {value!r}")
        super().__init__(**others)
