"""Where documents lie in a row."""

import torch
from jaxtyping import Int, Int32
from torch import Tensor


def starts(documents: Int[Tensor, "rows seq"]) -> Int32[Tensor, "rows seq"]:
    """The place in its row of the first token of each token's document; a document is a run of one index."""
    place = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(first, place, 0).cummax(dim=1).values
