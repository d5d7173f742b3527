"""What both references need: causal masks with documents, random tensors. One process, no cleverness."""

import torch
from torch import Tensor


def attention_mask(tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """[rows, 1, query, key]: whether a query may look at a key: not later, and of its own document."""
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]
    if document_ids is None:
        return causal
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | float, mask: Tensor) -> Tensor:
    """[rows, heads, seq, head_dim] of each; softmax over the keys, then [rows, seq, width]."""
    scores = query @ key.transpose(2, 3) * scale + bias
    mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
    return mixed.transpose(1, 2).flatten(2)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """fp32 normals: matrices of unit gain, norm weights around 1, biases large enough to be missed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.2 * values
        elif name.endswith("bias"):
            tensors[name] = 0.2 * values
        elif name == "embedding.weight":
            tensors[name] = 0.5 * values
        else:
            tensors[name] = values / shape[-1] ** 0.5
    return tensors
