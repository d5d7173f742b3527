"""One split of one corpus as an endless sequence of tokens with random access.

The token at position p is a pure function of manifest, seed and p. An epoch reads every shard once, in an order drawn from the
seed, the source's name and the epoch. Shards hold whole documents, so no document is cut between shards. Shards are webdataset
tars. They are read through a memory map at the offsets that the manifest implies, so that a position is a token count and a
resume reads nothing twice. The cache opens each shard and checks its hash first. A skipped shard keeps its positions, and
readers step over them.
"""

import hashlib
import mmap
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from tandem.trainer import config
from tandem.trainer.data import remote_files
from tandem.trainer.data.manifest import TAR_BLOCK_BYTES, CorpusManifest, CorpusSplit, DamagedShard
from tandem.trainer.data.shard_cache import MemoryMaps, ShardCache
from tandem.trainer.data.shard_content import check_ids

MAX_OPEN_SHARDS = 32
"""Memory maps per stream of a local folder; each uses a file descriptor. The rows of a step are close together, so few are in
use at a time. Streams of remote folders share the maps of the cache."""
ShardRange = tuple[int, int, int]
"""A range of tokens in one shard: the shard's index in the split, the first token, and the number of tokens."""


class DamagedSourceShard(DamagedShard):
    """A damaged shard, with the source that it belongs to."""

    def __init__(self, source: str, file: str, message: str):
        super().__init__(file, message)
        self.source = source


class TokenStream:
    """Reads any range of tokens, from any thread. If `seed` is None, every epoch uses the manifest's shard order."""

    def __init__(
        self, folder: str | Path, manifest: CorpusManifest, split: CorpusSplit, *,
        source: str, seed: int | None, cache: ShardCache | None = None,
    ):  # fmt: skip
        assert split.tokens > 0, "an empty split has no stream"
        self.epoch_tokens, self.dtype = split.tokens, np.dtype(manifest.dtype).newbyteorder("<")
        self.skipped_shard_indices: set[int] = set()
        """Indices of shards that `kept_ranges` and `next_kept_position` step over."""
        self._folder, self._shards, self._manifest = str(folder), split.shards, manifest
        self._checked_files: set[str] = set()
        """Shards whose ids this stream has checked."""
        self._cache = cache or ShardCache(config.ShardCacheConfig())
        self._source, self._seed = source, seed
        self._sample_tokens, self._header_tokens = manifest.sample_tokens, TAR_BLOCK_BYTES // manifest.token_bytes
        self._memory_maps = self._cache.memory_maps if remote_files.is_remote(folder) else MemoryMaps(MAX_OPEN_SHARDS)
        self._cached_epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def shard_ranges(self, position: int, num_tokens: int) -> list[ShardRange]:
        """Return the shard ranges of tokens [position, position + num_tokens), which may span shards and epochs."""
        ranges: list[ShardRange] = []
        while num_tokens > 0:
            order, starts, order_index, offset = self._locate(position)
            shard_offset = offset - starts[order_index]
            taken_tokens = min(num_tokens, self._shards[order[order_index]].tokens - shard_offset)
            ranges.append((order[order_index], shard_offset, taken_tokens))
            position, num_tokens = position + taken_tokens, num_tokens - taken_tokens
        return ranges

    def read_with_next_token(self, position: int, num_tokens: int) -> tuple[list[ShardRange], np.ndarray]:
        """Return the shard ranges of tokens [position, position + num_tokens), and these tokens with the one that follows."""
        order, starts, order_index, offset = self._locate(position)
        shard, shard_offset = order[order_index], offset - starts[order_index]
        sample, sample_offset = divmod(shard_offset, self._sample_tokens)
        if sample_offset + num_tokens < self._sample_tokens and shard_offset + num_tokens < self._shards[shard].tokens:
            first = (sample + 1) * self._header_tokens + shard_offset  # the usual case: all within one sample
            return [(shard, shard_offset, num_tokens)], self._open_shard(shard)[first : first + num_tokens + 1]
        ranges = self.shard_ranges(position, num_tokens)
        return ranges, self.read_shard_ranges(self._append_next_token(ranges, position + num_tokens))

    def _append_next_token(self, ranges: list[ShardRange], position: int) -> list[ShardRange]:
        """Append the next token of the stream to `ranges`, which end before `position`."""
        shard, first, count = ranges[-1]
        if first + count < self._shards[shard].tokens:
            return [*ranges[:-1], (shard, first, count + 1)]
        return ranges + self.shard_ranges(self.next_kept_position(position), 1)

    def read_shard_ranges(self, ranges: list[ShardRange]) -> np.ndarray:
        """Return the tokens of the ranges in the stored type. If they are contiguous in one file, this is a view.

        Raises: DamagedSourceShard if a shard is missing or its bytes do not match the manifest, UserError if an id is beyond
        the vocabulary.
        """
        slices = []
        for shard, first, count in ranges:
            slices += self._token_slices(shard, first, count)
        return slices[0] if len(slices) == 1 else np.concatenate(slices or [np.empty(0, self.dtype)])

    def read_tokens(self, position: int, num_tokens: int) -> np.ndarray:
        """Return tokens [position, position + num_tokens) of the stream."""
        return self.read_shard_ranges(self.shard_ranges(position, num_tokens))

    def prefetch(self, position: int, num_tokens: int) -> None:
        """Fetch and check the shards of [position, position + num_tokens) in the background."""
        for shard in {shard for shard, _, _ in self.shard_ranges(position, num_tokens)} - self.skipped_shard_indices:
            self._cache.prefetch(self._folder, self._shards[shard])

    def kept_ranges(self, position: int, num_tokens: int) -> list[tuple[int, int]]:
        """Return the parts of [position, position + num_tokens) that are not skipped, as (position, tokens)."""
        if not self.skipped_shard_indices:
            return [(position, num_tokens)]
        ranges = []
        for shard, _, range_tokens in self.shard_ranges(position, num_tokens):
            if shard not in self.skipped_shard_indices:
                ranges.append((position, range_tokens))
            position += range_tokens
        return ranges

    def next_kept_position(self, position: int) -> int:
        """Return the first position from `position` on that is not skipped."""
        while self.skipped_shard_indices:
            order, starts, place, offset = self._locate(position)
            if order[place] not in self.skipped_shard_indices:
                break
            position += starts[place] + self._shards[order[place]].tokens - offset
        return position

    def skip_shard(self, file: str) -> None:
        """Skip the shard from now on. Do nothing if there is no shard of that name."""
        self.skipped_shard_indices |= {index for index, shard in enumerate(self._shards) if shard.file == file}

    @property
    def kept_epoch_tokens(self) -> int:
        """Tokens of an epoch that are not skipped."""
        return self.epoch_tokens - sum(self._shards[index].tokens for index in self.skipped_shard_indices)

    def _locate(self, position: int) -> tuple[list[int], list[int], int, int]:
        """Return the epoch's shard order, the start of each shard, the place of this position's shard, and its epoch offset."""
        epoch, offset = divmod(position, self.epoch_tokens)
        order, starts = self._cached_epoch_order(epoch)
        return order, starts, bisect_right(starts, offset) - 1, offset

    def _epoch_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return the shard indices in the order of the epoch, and the epoch offset at which each begins."""
        order = list(range(len(self._shards)))
        if self._seed is not None:
            # Sort by a hash, because no library guarantees the same permutation for a seed in every version.
            prefix = f"{self._seed}/{self._source}/{epoch}"
            order.sort(key=lambda index: hashlib.sha256(f"{prefix}/{index}".encode()).digest())
        lengths = [self._shards[index].tokens for index in order]
        return order, [0, *accumulate(lengths)][:-1]

    def _token_slices(self, shard_index: int, first_token: int, num_tokens: int) -> list[np.ndarray]:
        tar, slices = self._open_shard(shard_index), []
        while num_tokens > 0:
            sample, sample_offset = divmod(first_token, self._sample_tokens)
            taken_tokens = min(num_tokens, self._sample_tokens - sample_offset)
            first = (sample + 1) * self._header_tokens + first_token
            slices.append(tar[first : first + taken_tokens])
            first_token += taken_tokens
            num_tokens -= taken_tokens
        return slices

    def _open_shard(self, shard_index: int) -> np.ndarray:
        """Return the whole tar file as an array of tokens, including its headers."""
        shard = self._shards[shard_index]
        if (mapped := self._memory_maps.find(self._folder, shard.file)) is not None:
            return mapped
        try:
            # No lock: while one thread waits for a shard, others can read or wait for theirs.
            with self._cache.open_shard(self._folder, shard) as file:
                try:
                    tar = mmap.mmap(file.fileno(), shard.bytes, access=mmap.ACCESS_READ)
                except ValueError:  # it was truncated after the check
                    message = f"{file.name}: has fewer than the {shard.bytes} bytes in the manifest; restore it"
                    raise DamagedShard(shard.file, message) from None
        except DamagedShard as error:
            raise DamagedSourceShard(self._source, shard.file, str(error)) from None
        tokens = np.frombuffer(tar, self.dtype)
        if shard.file not in self._checked_files:
            check_ids(tokens, remote_files.join_address(self._folder, shard.file), shard, self._manifest)
            self._checked_files.add(shard.file)
        self._memory_maps.add(self._folder, shard.file, tokens)
        return tokens
