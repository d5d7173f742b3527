"""The bounds of documents in a row of tokens."""

import torch
from jaxtyping import Int, Int32
from torch import Tensor


def document_starts(document_ids: Int[Tensor, "rows seq"]) -> Int32[Tensor, "rows seq"]:
    """Return, for each token, the position in its row of the first token of its document: a run of equal ids."""
    row = torch.arange(document_ids.shape[1], dtype=torch.int32, device=document_ids.device)
    positions = row.expand_as(document_ids)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, positions, 0).cummax(dim=1).values
