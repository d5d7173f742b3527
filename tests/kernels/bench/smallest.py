"""The smallest shape of each operation, for tests on the CPU."""

from dataclasses import replace

import torch

from tandem.kernels.bench.ops import Operation

TOKENS = 8
SMALLEST = {"qkv": "demo-stablelm 128 tp1", "attention": "mup-check 128 tp1", "residual_norm": "mup-check"}


def smallest(op: Operation, dtype: torch.dtype = torch.bfloat16):
    """In the precision of the real runs, which differs from that of the smallest config."""
    name = SMALLEST.get(op.name, "mup-check tp1")
    return replace(next(shape for shape in op.extra_shapes if shape.name == name).with_tokens(TOKENS), dtype=dtype)
