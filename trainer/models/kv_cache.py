"""The keys and values of the tokens that a decoder has read, so that generation does not read them again.

`Decoder.next_token_logits` appends the document ids of new tokens, and each attention layer their keys and values. Rows of
different length are padded *before* their first token. Padding has a negative document id, so attention masks it.
"""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn


class KVCache:
    """Document ids, and keys and values per layer. The capacity doubles if it is exceeded."""

    document_ids: Int32[Tensor, "rows keys"]
    has_multiple_documents: bool
    """Whether any row has more than one document. Padding counts as one."""

    def __init__(self) -> None:
        self._keys_and_values: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def append_document_ids(self, document_ids: Int32[Tensor, "rows queries"]) -> None:
        """Append the next tokens. Every layer must then call `update` with their keys and values."""
        self.document_ids = (
            torch.cat((self.document_ids, document_ids), dim=1) if self._keys_and_values else document_ids
        )
        self.has_multiple_documents = bool((self.document_ids != self.document_ids[:, :1]).any())

    def update(
        self, layer: nn.Module, key: Float[Tensor, "rows queries num_kv_heads_local head_dim"],
        value: Float[Tensor, "rows queries num_kv_heads_local head_dim"],
    ) -> tuple[
        Float[Tensor, "rows keys num_kv_heads_local head_dim"], Float[Tensor, "rows keys num_kv_heads_local head_dim"]
    ]:  # fmt: skip
        """Append keys and values of a layer, and return those of all its tokens."""
        end = self.document_ids.shape[1]
        start = end - key.shape[1]
        keys_and_values = self._keys_and_values.get(layer, (key[:, :0], value[:, :0]))
        if keys_and_values[0].shape[1] < end:
            padding = (0, 0, 0, 0, 0, 2 * end - start)  # of the last three dims; only the keys' dim grows
            key_buffer, value_buffer = (nn.functional.pad(buffer[:, :start], padding) for buffer in keys_and_values)
            keys_and_values = self._keys_and_values[layer] = key_buffer, value_buffer
        keys_and_values[0][:, start:end], keys_and_values[1][:, start:end] = key, value
        return keys_and_values[0][:, :end], keys_and_values[1][:, :end]

    def row_lengths(self) -> Int64[Tensor, " rows"]:
        """Return the number of tokens in each row, without padding."""
        return (self.document_ids >= 0).sum(dim=1)
