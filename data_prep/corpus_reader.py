"""A prepared corpus, open: its manifest, its vocabulary, the tokens of its shards and the documents in any range of them.

Shards are opened through the trainer's cache, so a corpus may lie at a remote address, and what is seen here are the
bytes the manifest was written for. The one idea: where documents end is read from the tokens, whole shards at a time,
which is faster than any index of them would be to fetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tandem.data_prep.vocabulary import Vocabulary
from tandem.trainer import config
from tandem.trainer.data import manifest, remote_files
from tandem.trainer.data.manifest import Shard, Split
from tandem.trainer.data.shard_cache import Cache


@dataclass(frozen=True)
class Piece:
    """The part of one document that lies in a range."""

    document: int
    """Its number in the split, from 0."""
    shard: str
    first: int
    """Token of the shard at which the piece begins."""
    tokens: np.ndarray
    before: int
    """Tokens of the document before the piece."""
    after: int
    """Tokens of the document after the piece."""

    @property
    def length(self) -> int:
        """Tokens of the whole document, EOS counted."""
        return self.before + len(self.tokens) + self.after


class Corpus:
    def __init__(self, folder: str):
        """Raises: UserError where there is no corpus, or its tokenizer is not its own."""
        self.folder, self.manifest = folder, manifest.load(folder)
        tokenizer = remote_files.below(folder, manifest.TOKENIZER_FILE)
        manifest.check_tokenizer(tokenizer, self.manifest, folder)
        self.vocabulary = Vocabulary(remote_files.content(tokenizer).decode(), self.manifest.eos_token, tokenizer)
        self._cache = Cache(config.Cache())

    @property
    def shards(self) -> list[Shard]:
        return [*self.manifest.train.shards, *self.manifest.validation.shards]

    def samples(self, shard: Shard) -> Iterator[np.ndarray]:
        """The tokens of a shard, in the arrays they are stored in, not copied.

        Raises: DamagedShard.
        """
        corpus = self.manifest
        dtype = np.dtype(corpus.dtype).newbyteorder("<")
        with self._cache.opened(self.folder, shard) as file:
            tar = np.memmap(file, np.uint8, "r")
        for number, first in enumerate(range(0, shard.tokens, corpus.sample_tokens)):
            size_bytes = min(corpus.sample_tokens, shard.tokens - first) * corpus.token_bytes
            offset = corpus.sample_offset(number)
            yield tar[offset : offset + size_bytes].view(dtype)

    def tokens(self, shard: Shard) -> np.ndarray:
        """All tokens of a shard.  Raises: DamagedShard."""
        return np.concatenate(list(self.samples(shard)))

    def pieces(self, split: Split, start: int, count: int) -> Iterator[Piece]:
        """The documents in tokens [start, start + count) of a split in the order it is stored in.

        Raises: DamagedShard.
        """
        first_token = first_document = 0
        for shard in split.shards:
            low, high = max(start - first_token, 0), min(start + count - first_token, shard.tokens)
            if low < high:
                yield from self._pieces(shard, low, high, first_document)
            first_token, first_document = first_token + shard.tokens, first_document + shard.documents

    def _pieces(self, shard: Shard, low: int, high: int, first_document: int) -> Iterator[Piece]:
        tokens = self.tokens(shard)
        ends = np.flatnonzero(tokens == self.manifest.eos_id) + 1
        begins = np.concatenate([[0], ends[:-1]])
        for index in range(ends.searchsorted(low, "right"), begins.searchsorted(high, "left")):
            begin, end = int(begins[index]), int(ends[index])
            left, right = max(begin, low), min(end, high)
            piece = tokens[left:right]
            yield Piece(first_document + index, shard.file, left, piece, left - begin, end - right)

    def place_of(self, split: Split, document: int) -> tuple[int, int]:
        """The first token in the split, and the tokens, of a document by its number.  Raises: DamagedShard."""
        first_token = 0
        for shard in split.shards:
            if document < shard.documents:
                ends = np.flatnonzero(self.tokens(shard) == self.manifest.eos_id) + 1
                begin = int(ends[document - 1]) if document else 0
                return first_token + begin, int(ends[document]) - begin
            first_token, document = first_token + shard.tokens, document - shard.documents
        raise AssertionError("the split has the document")
