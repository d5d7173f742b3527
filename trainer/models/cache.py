"""What a decoder keeps of the tokens it has read, so that reading on does not begin from the first again.

Attention finds it in the family's context and extends it; nothing else knows of it. Rows of different length are padded
*before* their first token: padding has a negative document, and what is of another document is never seen.
"""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn


class Cache:
    """Documents of the tokens read so far, and in every layer their keys and values; room for all tokens is made once."""

    documents: Int32[Tensor, "rows keys"]

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def begin(self, documents: Int32[Tensor, "rows queries"]) -> None:
        """The next tokens are announced; every layer will bring their keys and values."""
        self.documents = torch.cat((self.documents, documents), dim=1) if self._held else documents

    def extended(
        self,
        layer: nn.Module,
        key: Float[Tensor, "rows queries kv_heads_local head_dim"],
        value: Float[Tensor, "rows queries kv_heads_local head_dim"],
    ) -> tuple[Float[Tensor, "rows keys kv_heads_local head_dim"], Float[Tensor, "rows keys kv_heads_local head_dim"]]:
        """Keys and values of all tokens in this layer, those given last."""
        end = self.documents.shape[1]
        if layer not in self._held:
            room = (key.shape[0], self.capacity_tokens, *key.shape[2:])
            self._held[layer] = key.new_empty(room), value.new_empty(room)
        keys, values = (held[:, :end] for held in self._held[layer])
        keys[:, -key.shape[1] :] = key
        values[:, -value.shape[1] :] = value
        return keys, values

    def lengths(self) -> Int64[Tensor, " rows"]:
        """Tokens of every row, padding left out."""
        return (self.documents >= 0).sum(dim=1)
