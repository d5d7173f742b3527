"""Shapes beyond those of the shipped configs: the ones that rivals publish, and fp32 heads."""

from dataclasses import dataclass

import torch

from tandem.kernels.bench.shapes import (
    MODELS,
    AttentionShape,
    FeedForwardShape,
    LogitsShape,
    ModelShape,
    Shape,
    tokens_per_pass,
)


@dataclass(frozen=True)
class ResidualShape(Shape):
    hidden_size: int


def residual_shapes(models: tuple[ModelShape, ...] = MODELS) -> list[ResidualShape]:
    """The residual stream is whole on every rank."""
    return [
        ResidualShape(model.name, tokens, model.hidden_size, dtype=model.dtype)
        for model in models
        for tokens in tokens_per_pass(model)
    ]


LIGER_FEED_FORWARD_SHAPES = [FeedForwardShape("liger 8192x16384", 8_192, 16_384, 4_096)]
"""Source: Liger-Kernel benchmark/data/all_benchmark_data.csv, megatron_swiglu."""
LIGER_LOGITS_SHAPES = [
    LogitsShape(f"liger 8192x{columns}", 8_192, 4_096, columns, columns, 1.0)
    for columns in (50_304, 65_536, 100_352, 131_072)
]
"""Source: the same table, megatron_cross_entropy, and our two vocabularies with its number of tokens."""
CUTE_LOGITS_SHAPES = [LogitsShape("cute 8192x4096x131072", 8_192, 4_096, 131_072, 131_072, 1.0)]
"""Source: Liger-Kernel README.md, fused scaled cross entropy."""
FLASH_ATTENTION_SHAPES = [
    AttentionShape(
        f"flash {seq} hd{head_dim}", seq, 16_384 // seq, 2_048 // head_dim, 2_048 // head_dim, head_dim,
        0, False, False, False, head_dim**-0.5,
    )
    for head_dim in (64, 128)
    for seq in (2_048, 8_192, 16_384)
]  # fmt: skip
"""Source: flash-attention README.md, performance: 16,384 tokens, width 2,048, causal."""
FP32_ATTENTION_SHAPES = [
    AttentionShape(
        f"fp32 hd{head_dim} {kind}", 1_024, 1, 16, 16, head_dim, 0, False, kind == "slopes", kind == "documents",
        head_dim**-0.5, dtype=torch.float32,
    )
    for head_dim in (16, 32, 64)
    for kind in ("slopes", "documents")
]  # fmt: skip
"""The head dims that our kernel takes in fp32."""
