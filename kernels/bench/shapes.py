"""The sizes that are measured: what one rank holds of each shipped config with 1, 2 or 4 tensor-parallel ranks.

They are plain numbers because this package knows nothing of configs. `tests/kernels/bench/test_shapes.py` compares them with
`configs/`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch

TP_SIZES = (1, 2, 4)


class ModelShape(NamedTuple):
    name: str
    phases: tuple[tuple[int, int], ...]
    """Rows of one forward pass, tokens in a row."""
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    """0 if positions are linear biases (ALiBi)."""
    qk_layernorm: bool
    document_masking: bool
    ffn_hidden_sizes_local: tuple[int, int, int]
    """For each of TP_SIZES, padded to a multiple of 128 on a rank."""
    vocab_size: int
    vocab_sizes_local: tuple[int, int, int]
    logit_scale: float
    attention_scale: float
    precision: Literal["bf16", "fp32"]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


MODELS = (
    ModelShape("btlm-3b-8k", ((4, 2_048), (1, 8_192)), 2_560, 32, 32, 80, 0, False, False,
          (6_912, 3_456, 1_792), 50_257, (50_304, 25_216, 12_672), 0.222, 1 / 80, "bf16"),
    ModelShape("stablelm-2-12b", ((1, 4_096),), 5_120, 32, 8, 160, 40, True, True,
          (13_824, 6_912, 3_456), 100_352, (100_352, 50_176, 25_088), 1.0, 160**-0.5, "bf16"),
    ModelShape("stablelm-2-1_6b", ((2, 4_096),), 2_048, 32, 32, 64, 16, False, True,
          (5_632, 2_816, 1_408), 100_352, (100_352, 50_176, 25_088), 1.0, 64**-0.5, "bf16"),
)  # fmt: skip
"""The models that the kernels are written for."""
PRODUCTION_MODELS = MODELS[:2]
"""The two whose full runs are planned."""
SMALL_MODELS = (
    ModelShape("btlm-proxy-256", ((16, 2_048), (4, 8_192)), 256, 4, 4, 64, 0, False, False,
          (768, 384, 256), 50_257, (50_304, 25_216, 12_672), 2.22, 1 / 64, "bf16"),
    ModelShape("btlm-proxy-512", ((8, 2_048), (2, 8_192)), 512, 8, 8, 64, 0, False, False,
          (1_408, 768, 384), 50_257, (50_304, 25_216, 12_672), 1.11, 1 / 64, "bf16"),
    ModelShape("btlm-proxy-1024", ((4, 2_048), (1, 8_192)), 1_024, 16, 16, 64, 0, False, False,
          (2_816, 1_408, 768), 50_257, (50_304, 25_216, 12_672), 0.555, 1 / 64, "bf16"),
    ModelShape("demo-btlm", ((8, 128), (2, 512)), 128, 4, 4, 32, 0, False, False,
          (384, 256, 128), 4_096, (4_096, 2_048, 1_024), 1.11, 1 / 32, "fp32"),
    ModelShape("demo-stablelm", ((8, 128), (2, 512)), 128, 4, 2, 32, 8, True, True,
          (384, 256, 128), 4_096, (4_096, 2_048, 1_024), 1.0, 32**-0.5, "bf16"),
    ModelShape("mup-check", ((8, 128),), 64, 4, 4, 16, 0, False, False,
          (256, 128, 128), 512, (512, 256, 128), 2.22, 1 / 16, "fp32"),
)  # fmt: skip
"""The other shipped configs."""


@dataclass(frozen=True)
class Shape:
    name: str
    """Begins with the model's name."""
    tokens: int
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)

    @property
    def model_name(self) -> str:
        return self.name.split()[0]

    def with_tokens(self, tokens: int) -> Self:
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class FeedForwardShape(Shape):
    ffn_hidden_size: int
    hidden_size: int


@dataclass(frozen=True)
class LogitsShape(Shape):
    hidden_size: int
    padded_vocab_size: int
    vocab_size: int
    """Columns without padding."""
    logit_scale: float


@dataclass(frozen=True)
class AttentionShape(Shape):
    """`tokens` counts those of one row."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    qk_layernorm: bool
    has_alibi: bool
    document_masking: bool
    attention_scale: float

    def with_tokens(self, tokens: int) -> Self:
        return replace(self, tokens=tokens, batch_size=min(self.batch_size, 2))


def feed_forward_shapes(
    models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES
) -> list[FeedForwardShape]:
    return [
        FeedForwardShape(name, tokens, model.ffn_hidden_sizes_local[index], model.hidden_size, dtype=model.dtype)
        for model, name, index, tokens in _local_cases(models, tp_sizes)
    ]


def logits_shapes(models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES) -> list[LogitsShape]:
    """The logits of the last rank, which holds the padding."""
    shapes = []
    for model, name, index, tokens in _local_cases(models, tp_sizes):
        padded = model.vocab_sizes_local[index]
        columns = model.vocab_size - (TP_SIZES[index] - 1) * padded
        shapes.append(
            LogitsShape(name, tokens, model.hidden_size, padded, columns, model.logit_scale, dtype=model.dtype)
        )
    return shapes


def attention_shapes(
    models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES
) -> list[AttentionShape]:
    return [
        AttentionShape(
            f"{model.name} {seq} tp{tp_size}", seq, rows, model.num_heads // tp_size, model.num_kv_heads // tp_size,
            model.head_dim, model.rotary_dims, model.qk_layernorm, model.rotary_dims == 0, model.document_masking,
            model.attention_scale, dtype=model.dtype,
        )
        for model in models
        for tp_size in tp_sizes
        if model.num_kv_heads % tp_size == 0
        for rows, seq in model.phases
    ]  # fmt: skip


def tokens_per_pass(model: ModelShape) -> list[int]:
    """Tokens of one forward pass. Phases with equal products of rows and tokens are one shape to operations on tokens."""
    return sorted({rows * seq for rows, seq in model.phases})


def _local_cases(
    models: tuple[ModelShape, ...], tp_sizes: tuple[int, ...]
) -> Iterator[tuple[ModelShape, str, int, int]]:
    """Model, name of the shape, index in TP_SIZES, tokens."""
    for model in models:
        for tp_size in tp_sizes:
            for tokens in tokens_per_pass(model):
                yield model, f"{model.name} tp{tp_size}", TP_SIZES.index(tp_size), tokens
