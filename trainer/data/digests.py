"""Digests of what was really read: sums of hashes of ranges and tokens, and how ranks add them up. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

HALF_BITS = 32


@dataclass(frozen=True)
class BatchDigests:
    """Sums, over this rank's rows of a step, of a hash of each; added over all ranks they are a fact of the run."""

    ranges_digest: int
    """Of what was read: the row's index in the global step, its source, and the pieces of shards it came from."""
    tokens_digest: int
    """Of what is fed: the row's index in the global step and its tokens, in the type they are stored in."""


class StepDigests(NamedTuple):
    """Evidence of one step, summed over all its rows, modulo 2^64."""

    ranges_digest: int
    tokens_digest: int


def pack_u64(batch_digests: BatchDigests | None) -> list[float]:
    """The evidence of one rank's rows in numbers that fp64 adds up over ranks without rounding; none for none."""
    sums = (batch_digests.ranges_digest, batch_digests.tokens_digest) if batch_digests else ()
    return [float(half) for value in sums for half in divmod(value, 1 << HALF_BITS)]


def unpack_u64(summed: Sequence[float], tp_size: int) -> StepDigests | None:
    """The evidence of the step from `pack_u64` summed over all ranks.

    Raises: RuntimeError where the tensor-parallel ranks of one replica cannot have read the same rows.
    """
    if not summed:
        return None
    quotients, remainders = zip(*(divmod(int(half), tp_size) for half in summed), strict=True)
    if any(remainders):
        raise RuntimeError(
            f"evidence {list(summed)} does not divide by tp_size {tp_size}: the ranks of a replica have not read the same rows"
        )
    sums = [(high << HALF_BITS) + low for high, low in zip(quotients[::2], quotients[1::2], strict=True)]
    return StepDigests(*(value % (1 << 64) for value in sums))
