"""Digests of the rows that were read, as sums of hashes, and their exact summation over ranks. Torch is not imported here."""

from collections.abc import Sequence
from typing import NamedTuple

HALF_BITS = 32


class Digests(NamedTuple):
    """Sums of one hash per row, modulo 2^64, over one rank's rows of a step or over all rows. No layout changes the latter."""

    ranges_digest: int
    """Each hash covers the row's index in the global step, its source, and the shard ranges that it was read from."""
    tokens_digest: int
    """Each hash covers the row's index in the global step, and its tokens in the batch in their stored type."""


def pack_u64(digests: Digests | None) -> list[float]:
    """Split the digests into 32-bit halves, which fp64 sums over ranks without rounding; [] without digests."""
    return [float(half) for value in digests or () for half in divmod(value, 1 << HALF_BITS)]


def unpack_u64(summed: Sequence[float], tp_size: int) -> Digests | None:
    """Return the digests of the step from the results of `pack_u64`, summed over all ranks.

    Raises: RuntimeError if the tensor-parallel ranks of a replica cannot have read the same rows.
    """
    if not summed:
        return None
    quotients, remainders = zip(*(divmod(int(half), tp_size) for half in summed), strict=True)
    if any(remainders):
        raise RuntimeError(
            f"digests {list(summed)} are not divisible by tp_size {tp_size}: the ranks of a replica have read different rows"
        )
    sums = [(high << HALF_BITS) + low for high, low in zip(quotients[::2], quotients[1::2], strict=True)]
    return Digests(*(value % (1 << 64) for value in sums))
