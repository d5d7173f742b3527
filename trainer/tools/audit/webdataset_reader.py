"""Read the shards a second time, through the webdataset library.

The loader computes byte offsets from the manifest and never reads a tar header. webdataset walks the members of a tar file, as
every other client of the corpus does. If the members of a shard are not at the offsets that the loader expects, this reader
returns other tokens than the loader, even if the shard has the hash that its manifest lists.

Measured on two AMD EPYC cores (Python 3.11, webdataset 1.0.2; 105 MB of uint16 in eight shards of 65,536-token samples in the
page cache; medians of seven passes, MB per second of CPU time): byte offsets 1,190, webdataset 790.
"""

import tarfile
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import pairwise

import numpy as np

from tandem.trainer.config import UserError
from tandem.trainer.data.manifest import CorpusManifest, DamagedShard, Shard
from tandem.trainer.data.remote_files import join_address
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.token_stream import TokenStream
from tandem.trainer.tools.audit.reading_order import IntArray, ShardRanges

NUM_CACHED_SHARDS = 4
"""Number of shards kept in memory; a shuffle window seldom needs more."""


class WebdatasetReader:
    """Reads tokens of the training split of each source."""

    def __init__(
        self,
        folders: Mapping[str, str],
        manifests: Mapping[str, CorpusManifest],
        cache: ShardCache,
        skipped_shards: Collection[tuple[str, str]] = (),
    ):
        """`skipped_shards` has the source and file of each shard that the run skipped. The run may have read such a shard
        earlier, and the shard may be damaged now.
        """
        self._folders, self._manifests, self._cache, self._skipped_shards = folders, manifests, cache, skipped_shards
        self._shard_bytes = lru_cache(NUM_CACHED_SHARDS)(self._read_shard)
        self._unreadable_shards: set[tuple[str, int]] = set()
        self.unreadable_tokens: Counter[tuple[str, str]] = Counter()
        """Source and file of each skipped shard that can no longer be read -> number of its tokens that were requested."""
        self.miscounted_shards: dict[tuple[str, str], tuple[int, int]] = {}
        """Source and file of each shard with another number of tokens than the manifest lists -> tokens found and listed."""

    def __call__(self, source: str, ranges: ShardRanges, row_starts: IntArray) -> list[bytes | None]:
        """Return the tokens of each row as stored, or None if a skipped shard that holds part of the row cannot be read.

        Raises: DamagedShard if any other shard is not the one in the manifest. UserError if webdataset cannot read a shard.
        """
        read = [self._read_range(source, *each) for each in _entries(ranges)]
        for shard, part in zip(ranges.shard_index.tolist(), ranges.tokens.tolist(), strict=True):
            if (source, shard) in self._unreadable_shards:
                self.unreadable_tokens[source, self._manifests[source].train.shards[shard].file] += part
        rows = (read[begin:end] for begin, end in pairwise(row_starts.tolist()))
        return [None if None in row else b"".join(row) for row in rows]  # type: ignore[arg-type]

    def ranges_loader_reads_differently(self, source: str, ranges: ShardRanges) -> ShardRanges:
        """Select the ranges for which the loader's byte offsets give other tokens than webdataset."""
        corpus = self._manifests[source]
        stream = TokenStream(self._folders[source], corpus, corpus.train, source=source, seed=None, cache=self._cache)
        pairs = ((stream.read_shard_ranges([each]), self._read_range(source, *each)) for each in _entries(ranges))
        return ranges.select(np.array([tokens.tobytes() != found for tokens, found in pairs], bool))

    def _read_range(self, source: str, shard: int, first_token: int, num_tokens: int) -> bytes | None:
        if (source, shard) in self._unreadable_shards:
            return None
        size = self._manifests[source].token_bytes
        try:
            return self._shard_bytes(source, shard)[first_token * size : (first_token + num_tokens) * size]
        except DamagedShard as error:
            if (source, error.file) not in self._skipped_shards:
                raise
            self._unreadable_shards.add((source, shard))
            return None

    def _read_shard(self, source: str, index: int) -> bytes:
        corpus = self._manifests[source]
        shard, size = corpus.train.shards[index], corpus.token_bytes
        content = self._walk(self._folders[source], shard, field=f"u{8 * size}")
        if (found := len(content) // size) != shard.tokens:
            self.miscounted_shards[source, shard.file] = found, shard.tokens
        return content

    def _walk(self, folder: str, shard: Shard, field: str) -> bytes:
        """Return the tokens of all samples of a shard, in webdataset's order."""
        from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch, which takes a second

        # These are the stages of webdataset.WebDataset after its opener. The opener is left out because WDS_CACHE and
        # GOPEN_REWRITE in the environment can make it open another file than the one whose hash was checked.
        with self._cache.open_shard(folder, shard) as file:
            try:
                samples = group_by_keys(tar_file_expander([{"url": shard.file, "stream": file}]))
                return b"".join(sample.get(field, b"") for sample in samples)
            except (tarfile.TarError, ValueError) as error:
                reason = " ".join(str(error.args[0] if error.args else error).split())[:200]
                raise UserError(
                    f"{join_address(folder, shard.file)}: webdataset cannot read the shard ({reason}); prepare the corpus again"
                ) from None


def _entries(ranges: ShardRanges) -> list[tuple[int, int, int]]:
    return list(zip(ranges.shard_index.tolist(), ranges.first_token.tolist(), ranges.tokens.tolist(), strict=True))
