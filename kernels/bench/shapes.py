"""The sizes that are measured: what one rank holds of each shipped config with 1, 2 or 4 tensor-parallel ranks.

They are plain numbers because this package knows nothing of configs. `tests/kernels/bench/test_shapes.py` compares them with
`configs/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

TP_SIZES = (1, 2, 4)
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Model:
    """The sizes of a model. An operation reads only the sizes that concern it."""

    name: str
    phases: tuple[tuple[int, int], ...] = ()
    """Rows of one forward pass, tokens in a row."""
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    rotary_dims: int = 0
    """0 if positions are linear biases (ALiBi)."""
    qk_layernorm: bool = False
    document_masking: bool = False
    ffn_hidden_size: int = 0
    vocab_size: int = 0
    """Columns without padding."""
    logit_scale: float = 1.0
    attention_scale: float = 1.0
    dtype: torch.dtype = BF16


@dataclass(frozen=True, kw_only=True)
class Shape(Model):
    """The part of a model that one rank holds. Its name begins with the model's name."""

    tokens: int
    """Of one row. Operations on tokens see all rows of a forward pass as one."""
    batch_size: int = 1
    has_alibi: bool = False
    padded_vocab_size: int = 0

    @property
    def model_name(self) -> str:
        return self.name.split()[0]

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def with_tokens(self, tokens: int) -> "Shape":
        return replace(self, tokens=tokens, batch_size=min(self.batch_size, 2))


MODELS = (
    Model("btlm-3b-8k", ((4, 2_048), (1, 8_192)), 2_560, 32, 32, 80, 0, False, False, 6_912, 50_257, 0.222, 1 / 80),
    Model("stablelm-2-12b", ((1, 4_096),), 5_120, 32, 8, 160, 40, True, True, 13_824, 100_352, 1.0, 160**-0.5),
    Model("stablelm-2-1_6b", ((2, 4_096),), 2_048, 32, 32, 64, 16, False, True, 5_632, 100_352, 1.0, 64**-0.5),
)
"""The models that the kernels are written for."""
PRODUCTION_MODELS = [model.name for model in MODELS[:2]]
"""The names of the two whose full runs are planned."""
SMALL_MODELS = (
    Model("btlm-proxy-256", ((16, 2_048), (4, 8_192)), 256, 4, 4, 64, 0, False, False, 768, 50_257, 2.22, 1 / 64),
    Model("btlm-proxy-512", ((8, 2_048), (2, 8_192)), 512, 8, 8, 64, 0, False, False, 1_408, 50_257, 1.11, 1 / 64),
    Model(
        "btlm-proxy-1024", ((4, 2_048), (1, 8_192)), 1_024, 16, 16, 64, 0, False, False, 2_816, 50_257, 0.555, 1 / 64
    ),
    Model("demo-btlm", ((8, 128), (2, 512)), 128, 4, 4, 32, 0, False, False, 384, 4_096, 1.11, 1 / 32, FP32),
    Model("demo-stablelm", ((8, 128), (2, 512)), 128, 4, 2, 32, 8, True, True, 384, 4_096, 1.0, 32**-0.5),
    Model("mup-check", ((8, 128),), 64, 4, 4, 16, 0, False, False, 256, 512, 2.22, 1 / 16, FP32),
)
"""The other shipped configs."""


def token_shapes(models: Sequence[Model] = MODELS, tp_sizes: Sequence[int] = TP_SIZES) -> list[Shape]:
    """The shapes of operations on tokens. Phases with equally many tokens in a pass are one shape."""
    return [
        _local_shape(model, tp_size, f"{model.name} tp{tp_size}", tokens, 1)
        for model in models
        for tp_size in tp_sizes
        for tokens in sorted({rows * seq for rows, seq in model.phases})
    ]


def attention_shapes(models: Sequence[Model] = MODELS, tp_sizes: Sequence[int] = TP_SIZES) -> list[Shape]:
    return [
        _local_shape(model, tp_size, f"{model.name} {seq} tp{tp_size}", seq, rows)
        for model in models
        for tp_size in tp_sizes
        if model.num_kv_heads % tp_size == 0
        for rows, seq in model.phases
    ]


def rotary_shapes(models: Sequence[Model] = MODELS, tp_sizes: Sequence[int] = TP_SIZES) -> list[Shape]:
    return [shape for shape in attention_shapes(models, tp_sizes) if shape.rotary_dims]


def _local_shape(model: Model, tp_size: int, name: str, tokens: int, rows: int) -> Shape:
    """What the last rank holds, which has the padding of the vocabulary. Sizes are padded to a multiple of 128 on a rank."""
    ffn, padded = (-(-size // (128 * tp_size)) * 128 for size in (model.ffn_hidden_size, model.vocab_size))
    local: dict[str, Any] = {
        "name": name, "tokens": tokens, "batch_size": rows, "num_heads": model.num_heads // tp_size,
        "num_kv_heads": model.num_kv_heads // tp_size, "has_alibi": model.rotary_dims == 0, "ffn_hidden_size": ffn,
        "vocab_size": model.vocab_size - (tp_size - 1) * padded, "padded_vocab_size": padded,
    }  # fmt: skip
    return Shape(**vars(model) | local)
