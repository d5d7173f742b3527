"""What a decoder keeps of the tokens it has read, so that reading on does not begin from the first again.

`Decoder.next_token_logits` announces tokens to it, and each attention extends it with their keys and values. Rows of
different length are padded *before* their first token: padding has a negative document, and what is of another document is
never seen.
"""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn


class KVCache:
    """Documents of the tokens read so far, and in every layer their keys and values; room doubles when it runs out."""

    document_ids: Int32[Tensor, "rows keys"]
    has_multiple_documents: bool
    """Whether a row holds more than one document; padding is one."""

    def __init__(self) -> None:
        self._keys_and_values: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def append_document_ids(self, document_ids: Int32[Tensor, "rows queries"]) -> None:
        """The next tokens are announced; every layer will bring their keys and values."""
        self.document_ids = (
            torch.cat((self.document_ids, document_ids), dim=1) if self._keys_and_values else document_ids
        )
        self.has_multiple_documents = bool((self.document_ids != self.document_ids[:, :1]).any())

    def update(
        self,
        layer: nn.Module,
        key: Float[Tensor, "rows queries num_kv_heads_local head_dim"],
        value: Float[Tensor, "rows queries num_kv_heads_local head_dim"],
    ) -> tuple[
        Float[Tensor, "rows keys num_kv_heads_local head_dim"], Float[Tensor, "rows keys num_kv_heads_local head_dim"]
    ]:
        """Keys and values of all tokens in this layer, those given last."""
        end = self.document_ids.shape[1]
        start = end - key.shape[1]
        keys_and_values = self._keys_and_values.get(layer, (key[:, :0], value[:, :0]))
        if keys_and_values[0].shape[1] < end:
            keys_and_values = self._keys_and_values[layer] = (
                _grow(keys_and_values[0], start, 2 * end),
                _grow(keys_and_values[1], start, 2 * end),
            )
        keys_and_values[0][:, start:end], keys_and_values[1][:, start:end] = key, value
        return keys_and_values[0][:, :end], keys_and_values[1][:, :end]

    def row_lengths(self) -> Int64[Tensor, " rows"]:
        """Tokens of every row, padding left out."""
        return (self.document_ids >= 0).sum(dim=1)


def _grow(tensor: Tensor, num_used: int, capacity: int) -> Tensor:
    """The first `num_used` positions, with room for `capacity`."""
    grown = tensor.new_empty((tensor.shape[0], capacity, *tensor.shape[2:]))
    grown[:, :num_used] = tensor[:, :num_used]
    return grown
