"""The sizes measured and compiled: what one rank holds of the shipped configs over 1, 2 and 4, and the rivals' own.

Plain numbers, because nothing here knows of configs; tests/kernels/bench/test_shapes.py derives them from configs/*.yaml and
compares.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

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
    """0 where positions are linear biases."""
    qk_layernorm: bool
    document_masking: bool
    """Attention stays within them."""
    ffn_hidden_sizes_local: tuple[int, int, int]
    """Over each of TP_SIZES, padded to a multiple of 128 on a rank."""
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
"""The models the kernels are for."""
PRODUCTION_MODELS = MODELS[:2]
"""Those whose runs are planned in full."""
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
"""The other shipped configs: compiled for, and measured when asked for by name."""


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    dtype: torch.dtype = field(default=torch.bfloat16, kw_only=True)

    def with_tokens(self, tokens: int) -> "Shape":
        """As narrow or wide, for so many tokens."""
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class FeedForwardShape(Shape):
    ffn_hidden_size: int
    hidden_size: int


@dataclass(frozen=True)
class ResidualShape(Shape):
    hidden_size: int


@dataclass(frozen=True)
class LogitsShape(Shape):
    hidden_size: int
    """Of the hidden state before the head."""
    padded_vocab_size: int
    """Padding included."""
    vocab_size: int
    """Columns that are true."""
    logit_scale: float


@dataclass(frozen=True)
class AttentionShape(Shape):
    """`tokens` are those of a row."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    qk_layernorm: bool
    has_alibi: bool
    document_masking: bool
    attention_scale: float

    def with_tokens(self, tokens: int) -> "AttentionShape":
        return replace(self, tokens=tokens, batch_size=min(self.batch_size, 2))


def feed_forward_shapes(
    models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES
) -> list[FeedForwardShape]:
    return [
        FeedForwardShape(
            f"{model.name} tp{tp_size}",
            tokens,
            model.ffn_hidden_sizes_local[index],
            model.hidden_size,
            dtype=model.dtype,
        )
        for model in models
        for index, tp_size, tokens in _local_cases(model, tp_sizes)
    ]


def residual_shapes(models: tuple[ModelShape, ...] = MODELS) -> list[ResidualShape]:
    """The residual stream is whole on every rank."""
    return [
        ResidualShape(model.name, tokens, model.hidden_size, dtype=model.dtype)
        for model in models
        for tokens in _tokens_per_pass(model)
    ]


def logits_shapes(models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES) -> list[LogitsShape]:
    """Of the last rank, which holds the padding."""
    found = []
    for model in models:
        for index, tp_size, tokens in _local_cases(model, tp_sizes):
            padded_vocab_size = model.vocab_sizes_local[index]
            vocab_size = model.vocab_size - (tp_size - 1) * padded_vocab_size
            sizes = (tokens, model.hidden_size, padded_vocab_size, vocab_size, model.logit_scale)
            found.append(LogitsShape(f"{model.name} tp{tp_size}", *sizes, dtype=model.dtype))
    return found


def attention_shapes(
    models: tuple[ModelShape, ...] = MODELS, tp_sizes: tuple[int, ...] = TP_SIZES
) -> list[AttentionShape]:
    return [
        AttentionShape(
            f"{model.name} {seq} tp{tp_size}", seq, rows, model.num_heads // tp_size, model.num_kv_heads // tp_size,
            model.head_dim,
            model.rotary_dims, model.qk_layernorm, model.rotary_dims == 0, model.document_masking, model.attention_scale,
            dtype=model.dtype,
        )
        for model in models
        for tp_size in tp_sizes
        if model.num_kv_heads % tp_size == 0
        for rows, seq in model.phases
    ]  # fmt: skip


LIGER_FEED_FORWARD_SHAPES = [FeedForwardShape("liger 8192x16384", 8_192, 16_384, 4_096)]
"""Source: Liger-Kernel benchmark/data/all_benchmark_data.csv, megatron_swiglu."""
LIGER_LOGITS_SHAPES = [
    LogitsShape(f"liger 8192x{columns}", 8_192, 4_096, columns, columns, 1.0)
    for columns in (50_304, 65_536, 100_352, 131_072)
]
"""Source: the same table, megatron_cross_entropy, and both vocabularies of ours at its number of tokens."""
CUTE_LOGITS_SHAPES = [LogitsShape("cute 8192x4096x131072", 8_192, 4_096, 131_072, 131_072, 1.0)]
"""Source: Liger-Kernel README.md, fused scaled cross entropy."""
FLASH_ATTENTION_SHAPES = [
    AttentionShape(f"flash {seq} hd{head_dim}", seq, 16_384 // seq, 2_048 // head_dim, 2_048 // head_dim, head_dim,
          0, False, False,
          False, head_dim**-0.5)
    for head_dim in (64, 128)
    for seq in (2_048, 8_192, 16_384)
]  # fmt: skip
"""Source: flash-attention README.md, performance: 16,384 tokens, width 2,048, causal."""
FP32_ATTENTION_SHAPES = [
    AttentionShape(f"fp32 hd{head_dim} {kind}", 1_024, 1, 16, 16, head_dim, 0, False, kind == "slopes", kind == "documents",
          head_dim**-0.5, dtype=torch.float32)
    for head_dim in (16, 32, 64)
    for kind in ("slopes", "documents")
]  # fmt: skip
"""Those that a kernel takes in fp32, to be compiled: with slopes and with documents."""


def _tokens_per_pass(model: ModelShape) -> list[int]:
    """Of one forward pass: phases that differ in the length of rows alone are one to operations on tokens."""
    return sorted({rows * seq for rows, seq in model.phases})


def _local_cases(model: ModelShape, tp_sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Place in the model's local sizes, number of ranks, tokens."""
    return [(TP_SIZES.index(tp_size), tp_size, tokens) for tp_size in tp_sizes for tokens in _tokens_per_pass(model)]
