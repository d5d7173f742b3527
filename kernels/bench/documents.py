"""Rows of documents, as a shape with documents has them."""

import random

import torch
from torch import Tensor

from tandem.kernels.bench.shapes import AttentionShape

MEAN_DOCUMENT_TOKENS = 1_000
"""Mean length. Lengths are exponential, cut where the row ends."""


def document_lengths(shape: AttentionShape) -> list[list[int]]:
    """Of the documents of each row, the same at every call."""
    rng = random.Random(0)
    found = []
    for _ in range(shape.batch_size):
        row: list[int] = []
        while (remaining_tokens := shape.tokens - sum(row)) > 0:
            row.append(
                min(remaining_tokens, 1 + int(rng.expovariate(1 / MEAN_DOCUMENT_TOKENS)))
                if shape.document_masking
                else remaining_tokens
            )
        found.append(row)
    return found


def document_ids(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """The index of each token's document, [rows, seq]."""
    if not shape.document_masking:
        return None
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in document_lengths(shape)]
    return torch.stack(rows).to(device, torch.int32)


def document_starts(shape: AttentionShape, device: torch.device) -> Tensor | None:
    """Where in its row each token's document begins, [rows, seq]."""
    from tandem.kernels import documents as of_documents

    apart = document_ids(shape, device)
    return None if apart is None else of_documents.document_starts(apart)
