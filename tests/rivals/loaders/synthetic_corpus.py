"""The corpus for all loaders: random ids in documents as long as web pages, as our shards and as one flat file."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit
from tandem.trainer.disk import atomic_write
from tests.data_prep.corpus_writer import write_split

VOCAB_SIZE, EOS_ID = 50_257, 50_256
ROW_TOKENS = 2_049
"""A row has 2,048 tokens and their targets."""
CORPUS_MULTIPLE_TOKENS = 192 * ROW_TOKENS
"""A corpus is a multiple of this, so that batches, steps and samples of 64 rows are whole and no loader drops rows."""
MEDIAN_DOCUMENT_TOKENS, DOCUMENT_LENGTH_SIGMA = 400, 1.2
"""Document lengths are lognormal."""
SAMPLE_TOKENS, SHARD_TOKENS = 65_536, 1 << 25
"""The defaults of `tandem prepare`."""
SEED = 0
FLAT_FILE, LENGTHS_FILE, SHARDS_FOLDER = "tokens.bin", "lengths.npy", "ours"


@dataclass(frozen=True)
class SyntheticCorpus:
    folder: Path
    num_tokens: int

    def open_tokens(self) -> np.ndarray:
        """Map the flat file of all tokens."""
        return np.memmap(self.folder / FLAT_FILE, np.uint16, "r")

    def iterate_documents(self) -> Iterator[np.ndarray]:
        tokens, end = self.open_tokens(), 0
        for length in np.load(self.folder / LENGTHS_FILE).tolist():
            yield tokens[end : end + length]
            end += length


def write_corpus(corpus: SyntheticCorpus) -> None:
    """Draw the corpus from SEED and write it to its folder."""
    shards_folder = corpus.folder / SHARDS_FOLDER
    shards_folder.mkdir()
    rng = np.random.default_rng(SEED)
    lengths = _draw_lengths(corpus.num_tokens, rng)
    tokens = rng.integers(0, EOS_ID, corpus.num_tokens, np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOS_ID
    tokens.tofile(corpus.folder / FLAT_FILE)
    np.save(corpus.folder / LENGTHS_FILE, lengths)
    del tokens
    shard_tokens = min(SHARD_TOKENS, corpus.num_tokens // 3)
    documents = corpus.iterate_documents()
    train = write_split(shards_folder, "train", documents, sample_tokens=SAMPLE_TOKENS, shard_tokens=shard_tokens)
    atomic_write(shards_folder / manifest.MANIFEST_FILE, manifest.dump_manifest(_manifest(train)))


def _draw_lengths(num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the tokens of each document, EOS included."""
    drawn = rng.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), DOCUMENT_LENGTH_SIGMA, num_tokens // 100 + 10)
    ends = np.cumsum(np.maximum(2, drawn.astype(np.int64)))
    return np.diff(ends[ends < num_tokens], prepend=0, append=num_tokens)


def _manifest(train: CorpusSplit) -> CorpusManifest:
    return CorpusManifest(
        dtype="uint16", sample_tokens=SAMPLE_TOKENS, vocab=VOCAB_SIZE, eos_token="<|endoftext|>", eos_id=EOS_ID,
        tokenizer_sha256=sha256(b"none").hexdigest(), unigram_entropy_nats=float(np.log(EOS_ID)), counts={},
        settings={}, train=train, validation=CorpusSplit(0, 0, []),
    )  # fmt: skip
