"""What a decoder keeps of the tokens it has read, so that reading on does not begin from the first again.

`Decoder.read` announces tokens to it, and each attention extends it with their keys and values. Rows of different length are
padded *before* their first token: padding has a negative document, and what is of another document is never seen.
"""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn


class Cache:
    """Documents of the tokens read so far, and in every layer their keys and values; room doubles when it runs out."""

    documents: Int32[Tensor, "rows keys"]
    mixed: bool
    """Whether a row holds more than one document; padding is one."""

    def __init__(self) -> None:
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def begin(self, documents: Int32[Tensor, "rows queries"]) -> None:
        """The next tokens are announced; every layer will bring their keys and values."""
        self.documents = torch.cat((self.documents, documents), dim=1) if self._held else documents
        self.mixed = bool((self.documents != self.documents[:, :1]).any())

    def extended(
        self,
        layer: nn.Module,
        key: Float[Tensor, "rows queries kv_heads_local head_dim"],
        value: Float[Tensor, "rows queries kv_heads_local head_dim"],
    ) -> tuple[Float[Tensor, "rows keys kv_heads_local head_dim"], Float[Tensor, "rows keys kv_heads_local head_dim"]]:
        """Keys and values of all tokens in this layer, those given last."""
        end = self.documents.shape[1]
        start = end - key.shape[1]
        held = self._held.get(layer, (key[:, :0], value[:, :0]))
        if held[0].shape[1] < end:
            held = self._held[layer] = _moved(held[0], start, 2 * end), _moved(held[1], start, 2 * end)
        held[0][:, start:end], held[1][:, start:end] = key, value
        return held[0][:, :end], held[1][:, :end]

    def lengths(self) -> Int64[Tensor, " rows"]:
        """Tokens of every row, padding left out."""
        return (self.documents >= 0).sum(dim=1)


def _moved(held: Tensor, used: int, capacity: int) -> Tensor:
    """The first `used` positions, with room for `capacity`."""
    room = held.new_empty((held.shape[0], capacity, *held.shape[2:]))
    room[:, :used] = held[:, :used]
    return room
