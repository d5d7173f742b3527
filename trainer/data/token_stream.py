"""One split of one corpus as an endless, randomly readable sequence of tokens.

The one idea: position p of the stream is a fact of (manifest, seed, p). An epoch is every shard once, in an
order drawn from the seed, the source's name and the epoch; a shard holds whole documents, so no document is
cut where shards meet. Shards are webdataset tars, read here through a memory map at the offsets the manifest
implies, because position is then a token count and a resume reads nothing twice. The cache opens them, and
has hashed their bytes before the first token is taken. A shard that is left out keeps its positions: readers
step over them.
"""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from tandem.trainer import config
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import TAR_BLOCK_BYTES, DamagedShard, Manifest, Shard, Split
from tandem.trainer.data.memory_maps import Maps
from tandem.trainer.data.shard_cache import Cache

OPEN_SHARDS = 32
"""Memory maps kept per stream of a local folder, a file descriptor each; rows of a step lie close together, so few are in
use at a time. The streams of remote folders share those that the cache has room for."""
Piece = tuple[int, int, int]
"""Neighbouring tokens of one shard: its index in the split, its first token taken, how many."""


class Damaged(DamagedShard):
    """The damaged shard of a source of this run."""

    def __init__(self, source: str, file: str, message: str):
        super().__init__(file, message)
        self.source = source


class Stream:
    """Reads of any window, from any thread. `seed` None keeps the shards in the manifest's order in every epoch."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        split: Split,
        *,
        name: str,
        seed: int | None,
        cache: Cache | None = None,
    ):
        assert split.tokens > 0, "an empty split has no stream"
        self.tokens, self.dtype = split.tokens, np.dtype(manifest.dtype).newbyteorder("<")
        self.left_out: set[int] = set()
        """Indices of shards that `kept` and `next_kept` step over."""
        self._folder, self._shards = str(folder), split.shards
        self._cache = cache or Cache(config.Cache())
        self._name, self._seed = name, seed
        self._sample_tokens, self._header = manifest.sample_tokens, TAR_BLOCK_BYTES // manifest.token_bytes
        self._maps = self._cache.maps if remote_files.is_remote(folder) else Maps(OPEN_SHARDS)
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)

    def pieces(self, position: int, count: int) -> list[Piece]:
        """Where tokens [position, position + count) of the stream lie, across shards and epochs."""
        found: list[Piece] = []
        while count > 0:
            order, starts, place, offset = self._place(position)
            inside = offset - starts[place]
            taken = min(count, self._shards[order[place]].tokens - inside)
            found.append((order[place], inside, taken))
            position, count = position + taken, count - taken
        return found

    def run(self, position: int, count: int) -> tuple[list[Piece], np.ndarray]:
        """Where tokens [position, position + count) lie; and they and the token that follows them, `tokens_of`."""
        order, starts, place, offset = self._place(position)
        shard, inside = order[place], offset - starts[place]
        sample, before = divmod(inside, self._sample_tokens)
        if before + count < self._sample_tokens and inside + count < self._shards[shard].tokens:
            first = (sample + 1) * self._header + inside  # all of it within one sample: nearly always
            return [(shard, inside, count)], self._open(shard)[first : first + count + 1]
        pieces = self.pieces(position, count)
        return pieces, self.tokens_of(self._and_next(pieces, position + count))

    def _and_next(self, pieces: list[Piece], position: int) -> list[Piece]:
        """The pieces, which end before the position, and the token of the stream that follows them."""
        shard, first, count = pieces[-1]
        if first + count < self._shards[shard].tokens:
            return [*pieces[:-1], (shard, first, count + 1)]
        return pieces + self.pieces(self.next_kept(position), 1)

    def tokens_of(self, pieces: list[Piece]) -> np.ndarray:
        """The tokens of the pieces, one after the other, in the stored type; where they lie together, no copy of them.

        Raises: Damaged naming the shard that is missing or whose bytes are not the manifest's.
        """
        slices = []
        for shard, first, count in pieces:
            slices += self._slices(shard, first, count)
        return slices[0] if len(slices) == 1 else np.concatenate(slices or [np.empty(0, self.dtype)])

    def read(self, position: int, count: int) -> np.ndarray:
        """Tokens [position, position + count) of the stream: `tokens_of` its pieces."""
        return self.tokens_of(self.pieces(position, count))

    def soon(self, position: int, count: int) -> None:
        """The shards of [position, position + count) are fetched and hashed in the background."""
        for shard in {shard for shard, _, _ in self.pieces(position, count)} - self.left_out:
            self._cache.soon(self._folder, self._shards[shard])

    def kept(self, position: int, count: int) -> list[tuple[int, int]]:
        """What is not left out of [position, position + count), as runs of (position, tokens)."""
        if not self.left_out:
            return [(position, count)]
        runs = []
        for shard, _, taken in self.pieces(position, count):
            if shard not in self.left_out:
                runs.append((position, taken))
            position += taken
        return runs

    def next_kept(self, position: int) -> int:
        """The first position from `position` on that is not left out."""
        while self.left_out:
            order, starts, place, offset = self._place(position)
            if order[place] not in self.left_out:
                break
            position += starts[place] + self._shards[order[place]].tokens - offset
        return position

    def leave_out(self, file: str) -> None:
        """From now on the shard is stepped over; nothing happens if there is none of that name."""
        self.left_out |= {index for index, shard in enumerate(self._shards) if shard.file == file}

    @property
    def kept_tokens(self) -> int:
        """Tokens of an epoch that are not left out."""
        return self.tokens - sum(self._shards[index].tokens for index in self.left_out)

    def _place(self, position: int) -> tuple[list[int], list[int], int, int]:
        """The order of the epoch at `position`, the place in it of the shard there, and the token within the epoch."""
        epoch, offset = divmod(position, self.tokens)
        order, starts = self._epoch(epoch)
        return order, starts, bisect_right(starts, offset) - 1, offset

    def _epoch_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shard indices in the order of the epoch, and the token of the epoch at which each begins."""
        order = list(range(len(self._shards)))
        if self._seed is not None:
            # Sorting by a hash, since no library promises the same permutation from a seed in every version.
            order.sort(key=lambda index: hashlib.sha256(f"{self._seed}/{self._name}/{epoch}/{index}".encode()).digest())
        lengths = [self._shards[index].tokens for index in order]
        return order, [0, *accumulate(lengths)][:-1]

    def _slices(self, index: int, start: int, count: int) -> list[np.ndarray]:
        tar, slices = self._open(index), []
        while count > 0:
            sample, inside = divmod(start, self._sample_tokens)
            taken = min(count, self._sample_tokens - inside)
            first = (sample + 1) * self._header + start
            slices.append(tar[first : first + taken])
            start += taken
            count -= taken
        return slices

    def _open(self, index: int) -> np.ndarray:
        """The whole file as if it were tokens; a header is so many of them."""
        shard = self._shards[index]
        kept = self._maps.kept(self._folder, shard.file)
        return self._mapped(shard) if kept is None else kept

    def _mapped(self, shard: Shard) -> np.ndarray:
        try:
            # Not under a lock: while one thread waits for a shard, others read or wait for theirs.
            with self._cache.opened(self._folder, shard) as file:
                try:
                    tar = mmap.mmap(file.fileno(), shard.bytes, access=mmap.ACCESS_READ)
                except ValueError:  # shorter than that, by now
                    raise DamagedShard(
                        shard.file, f"{file.name}: has fewer than {shard.bytes} bytes; restore it"
                    ) from None
        except DamagedShard as error:
            raise Damaged(self._name, shard.file, str(error)) from None
        found = np.frombuffer(tar, self.dtype)
        self._maps.keep(self._folder, shard.file, found)
        return found
