"""The sources of a run: their reading orders from the manifests' copies, less the shards that are left out at a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import numpy as np

from tandem.trainer.tools.audit.reading_order import Expansion, Ints, Pieces, rows

MOST_SHOWN_TOKENS = 1 << 24


class Corpora:
    """Reading orders by source. `left_out` changes as the ledger is gone through."""

    def __init__(self, expansions: Mapping[str, Expansion], held_out: Mapping[str, Collection[str]]):
        self.expansions = expansions
        self._held_out = held_out
        self.left_out: dict[str, set[int]] = {}
        """Source -> indices of shards."""

    def __contains__(self, source: str) -> bool:
        return source in self.expansions

    def leave_out(self, source: str, shard: str) -> bool:
        """From here on the shard is left out, of no consequence if it is a held-out one; False where there is no such shard."""
        files = self.expansions[source].files if source in self else []
        if shard not in files:
            return shard in self._held_out.get(source, ())
        self.left_out.setdefault(source, set()).add(files.index(shard))
        return True

    def pieces(self, source: str, start: int, end: int) -> tuple[Pieces, Pieces]:
        """Places [start, end) of a source: what is read there, and what is passed over."""
        pieces = self.expansions[source].pieces(start, end)
        passed = np.isin(pieces.shard, list(self.left_out.get(source, ())))
        return pieces.where(~passed), pieces.where(passed)

    def named(self, source: str, start: int, end: int) -> list[str]:
        """The ranges at places [start, end), as FILE:FIRST+TOKENS, what is left out included; the first few."""
        # Nothing that a damaged ledger says shall fill the memory.
        return self.expansions[source].named(self.expansions[source].pieces(start, min(end, start + MOST_SHOWN_TOKENS)))

    def rows(self, source: str, start: int, end: int, seq_len: int) -> tuple[Pieces, Ints]:
        """What is read at places [start, end), cut into rows, see `expansion.rows`."""
        return rows(self.pieces(source, start, end)[0], seq_len)

    def most(self, source: str, tokens: int) -> int:
        """Places within which so many tokens can be read."""
        left_out = list(self.left_out.get(source, ()))
        expansion = self.expansions[source]
        missing = int(expansion.shard_tokens[left_out].sum())
        return tokens + missing * (tokens // max(expansion.epoch_tokens - missing, 1) + 2)


def contents(source: str, pieces: Pieces, starts: Ints) -> list[bytes]:
    """What the evidence of ranges hashes of each row, after its number."""
    name = source.encode() + b"\0"
    fields = np.stack([pieces.shard, pieces.first, pieces.tokens], axis=1).astype("<i8").tobytes()
    return [name + fields[24 * begin : 24 * end] for begin, end in pairwise(starts.tolist())]
