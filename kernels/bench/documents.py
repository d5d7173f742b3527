"""Rows of documents, as a shape with documents has them."""

import random

import torch
from torch import Tensor

from tandem.kernels.bench.shapes import Heads

DOCUMENT_TOKENS = 1_000
"""Mean length. Lengths are exponential, cut where the row ends."""


def lengths(shape: Heads) -> list[list[int]]:
    """Of the documents of each row, the same at every call."""
    draw = random.Random(0)
    found = []
    for _ in range(shape.rows):
        row: list[int] = []
        while (left := shape.tokens - sum(row)) > 0:
            row.append(min(left, 1 + int(draw.expovariate(1 / DOCUMENT_TOKENS))) if shape.documents else left)
        found.append(row)
    return found


def documents(shape: Heads, device: torch.device) -> Tensor | None:
    """The index of each token's document, [rows, seq]."""
    if not shape.documents:
        return None
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths(shape)]
    return torch.stack(rows).to(device, torch.int32)


def starts(shape: Heads, device: torch.device) -> Tensor | None:
    """Where in its row each token's document begins, [rows, seq]."""
    from tandem.kernels import documents as of_documents

    apart = documents(shape, device)
    return None if apart is None else of_documents.starts(apart)
