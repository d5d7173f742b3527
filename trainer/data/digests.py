"""Digests of the rows that were read, as sums of hashes, and their exact summation over ranks. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

HALF_BITS = 32


@dataclass(frozen=True)
class BatchDigests:
    """Sums of one hash per row over this rank's rows of a step. Their sum over all ranks does not depend on the layout."""

    ranges_digest: int
    """Hashes the row's index in the global step, its source, and the shard ranges that it was read from."""
    tokens_digest: int
    """Hashes the row's index in the global step and the tokens in the batch, in the type they are stored in."""


class StepDigests(NamedTuple):
    """The digests of one step, summed over all its rows modulo 2^64."""

    ranges_digest: int
    tokens_digest: int


def pack_u64(batch_digests: BatchDigests | None) -> list[float]:
    """Split the digests into 32-bit halves, which fp64 sums over ranks without rounding. Without digests, return nothing."""
    sums = (batch_digests.ranges_digest, batch_digests.tokens_digest) if batch_digests else ()
    return [float(half) for value in sums for half in divmod(value, 1 << HALF_BITS)]


def unpack_u64(summed: Sequence[float], tp_size: int) -> StepDigests | None:
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
    return StepDigests(*(value % (1 << 64) for value in sums))
