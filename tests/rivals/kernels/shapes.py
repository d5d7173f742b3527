"""Shapes beyond those of the shipped configs: the ones that rivals publish, and fp32 heads."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tandem.kernels.bench.shapes import MODELS, Model, Shape, token_shapes


def residual_shapes(models: Sequence[Model] = MODELS) -> list[Shape]:
    """The residual stream is whole on every rank."""
    return [replace(shape, name=shape.model_name) for shape in token_shapes(models, (1,))]


LIGER_FEED_FORWARD_SHAPES = [Shape("liger 8192x16384", tokens=8_192, ffn_hidden_size=16_384, hidden_size=4_096)]
"""Source: Liger-Kernel benchmark/data/all_benchmark_data.csv, megatron_swiglu."""
LIGER_LOGITS_SHAPES = [
    Shape(f"liger 8192x{columns}", tokens=8_192, hidden_size=4_096, vocab_size=columns, padded_vocab_size=columns)
    for columns in (50_304, 65_536, 100_352, 131_072)
]
"""Source: the same table, megatron_cross_entropy, and our two vocabularies with its number of tokens."""
CUTE_LOGITS_SHAPES = [
    Shape("cute 8192x4096x131072", tokens=8_192, hidden_size=4_096, vocab_size=131_072, padded_vocab_size=131_072)
]
"""Source: Liger-Kernel README.md, fused scaled cross entropy."""
FLASH_ATTENTION_SHAPES = [
    Shape(
        f"flash {seq} hd{head_dim}", tokens=seq, batch_size=16_384 // seq, num_heads=2_048 // head_dim,
        num_kv_heads=2_048 // head_dim, head_dim=head_dim, attention_scale=head_dim**-0.5,
    )
    for head_dim in (64, 128)
    for seq in (2_048, 8_192, 16_384)
]  # fmt: skip
"""Source: flash-attention README.md, performance: 16,384 tokens, width 2,048, causal."""
FP32_ATTENTION_SHAPES = [
    Shape(
        f"fp32 hd{head_dim} {kind}", tokens=1_024, num_heads=16, num_kv_heads=16, head_dim=head_dim,
        has_alibi=kind == "slopes", document_masking=kind == "documents", attention_scale=head_dim**-0.5, dtype=torch.float32,
    )
    for head_dim in (16, 32, 64)
    for kind in ("slopes", "documents")
]  # fmt: skip
"""The head dims that our kernel takes in fp32."""
