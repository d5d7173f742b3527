"""Read a prepared corpus: manifest, vocabulary, tokens of shards, and the documents in any range of tokens.

Shards are opened through the trainer's cache, so a corpus may be at a remote address, and their hashes are checked. The
ends of documents are found by reading the tokens of whole shards, which is faster than fetching an index.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tandem.data_prep.vocabulary import Vocabulary
from tandem.trainer import config
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import CorpusSplit, Shard
from tandem.trainer.data.shard_cache import ShardCache
from tandem.trainer.data.shard_content import check_documents, check_ids


@dataclass(frozen=True)
class DocumentSlice:
    """The part of a document inside a range."""

    document_index: int
    """Index in the split, from 0."""
    shard_file: str
    start_token: int
    """Index in the shard of the slice's first token."""
    tokens: np.ndarray
    num_tokens_before: int
    """Tokens of the document before the slice."""
    num_tokens_after: int
    """Tokens of the document after the slice."""

    @property
    def num_document_tokens(self) -> int:
        """Tokens of the whole document, EOS included."""
        return self.num_tokens_before + len(self.tokens) + self.num_tokens_after


class CorpusReader:
    def __init__(self, folder: str):
        """Raises: UserError if there is no corpus, or the tokenizer does not match the manifest."""
        self.folder, self.manifest = folder, manifest.load_manifest(folder)
        tokenizer = remote_files.join_address(folder, manifest.TOKENIZER_FILE)
        manifest.check_tokenizer(tokenizer, self.manifest, folder)
        self.vocabulary = Vocabulary(remote_files.read_bytes(tokenizer).decode(), self.manifest.eos_token, tokenizer)
        self._shard_cache = ShardCache(config.ShardCacheConfig())

    def read_samples(self, shard: Shard) -> Iterator[np.ndarray]:
        """Yield the tokens of each sample of a shard, without a copy.  Raises: DamagedShard, UserError."""
        corpus_manifest = self.manifest
        dtype = np.dtype(corpus_manifest.dtype).newbyteorder("<")
        with self._shard_cache.open_shard(self.folder, shard) as file:
            tar = np.memmap(file, np.uint8, "r")
        path = remote_files.join_address(self.folder, shard.file)
        for check in (check_ids, check_documents):
            check(tar.view(dtype), path, shard, corpus_manifest)
        for sample_index, first in enumerate(range(0, shard.tokens, corpus_manifest.sample_tokens)):
            size_bytes = min(corpus_manifest.sample_tokens, shard.tokens - first) * corpus_manifest.token_bytes
            offset = corpus_manifest.sample_offset(sample_index)
            yield tar[offset : offset + size_bytes].view(dtype)

    def read_shard_tokens(self, shard: Shard) -> np.ndarray:
        """Return all tokens of a shard.  Raises: DamagedShard, UserError."""
        return np.concatenate(list(self.read_samples(shard)))

    def document_slices(self, split: CorpusSplit, start_token: int, num_tokens: int) -> Iterator[DocumentSlice]:
        """Yield the documents in tokens [start, start + count) of a split, in stored order.  Raises: DamagedShard."""
        first_token = first_document = 0
        for shard in split.shards:
            low, high = max(start_token - first_token, 0), min(start_token + num_tokens - first_token, shard.tokens)
            if low < high:
                yield from self._shard_document_slices(shard, low, high, first_document)
            first_token, first_document = first_token + shard.tokens, first_document + shard.documents

    def _shard_document_slices(
        self, shard: Shard, start_token: int, end_token: int, first_document_index: int
    ) -> Iterator[DocumentSlice]:
        tokens = self.read_shard_tokens(shard)
        ends = np.flatnonzero(tokens == self.manifest.eos_id) + 1
        begins = np.concatenate([[0], ends[:-1]])
        for index in range(ends.searchsorted(start_token, "right"), begins.searchsorted(end_token, "left")):
            begin, end = int(begins[index]), int(ends[index])
            left, right = max(begin, start_token), min(end, end_token)
            document = first_document_index + index
            yield DocumentSlice(document, shard.file, left, tokens[left:right], left - begin, end - right)

    def document_range(self, split: CorpusSplit, document_index: int) -> tuple[int, int]:
        """Return the index in the split of a document's first token, and its length.  Raises: DamagedShard."""
        first_token = 0
        for shard in split.shards:
            if document_index < shard.documents:
                ends = np.flatnonzero(self.read_shard_tokens(shard) == self.manifest.eos_id) + 1
                begin = int(ends[document_index - 1]) if document_index else 0
                return first_token + begin, int(ends[document_index]) - begin
            first_token, document_index = first_token + shard.tokens, document_index - shard.documents
        raise AssertionError(f"document_index is {document_index} beyond the split")
