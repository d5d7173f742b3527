"""Sizes inside the model: feed-forward width and vocabulary are padded for tensor cores and tensor-parallel ranks."""

PADDING_MULTIPLE = 128
"""Feed-forward width and vocabulary are rounded up to a multiple of this times tp_size inside the model, never outside."""


def padded_size(size: int, tp_size: int) -> int:
    """`size` rounded up so that each of `tp_size` ranks holds a multiple of PADDING_MULTIPLE."""
    multiple = PADDING_MULTIPLE * tp_size
    return -(-size // multiple) * multiple
