"""Padding of the feed-forward width and the vocabulary for tensor cores and tensor-parallel ranks."""

PADDING_MULTIPLE = 128
"""Inside the model, both sizes are rounded up to a multiple of this times tp_size. Config and checkpoints are unpadded."""


def padded_size(size: int, tp_size: int) -> int:
    """Round `size` up so that each of `tp_size` ranks holds a multiple of PADDING_MULTIPLE."""
    multiple = PADDING_MULTIPLE * tp_size
    return -(-size // multiple) * multiple
