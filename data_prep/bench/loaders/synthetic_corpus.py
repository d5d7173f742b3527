"""The corpus that everyone reads: random ids in documents of lengths as web text has them, as shards of ours and flat."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from tandem.data_prep.shard_writer import write_split
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import CorpusManifest, CorpusSplit
from tandem.trainer.disk import atomic_write

VOCAB_SIZE, EOS_ID = 50_257, 50_256
ROW_TOKENS = 2_049
"""A row of 2,048 tokens and their targets."""
CORPUS_MULTIPLE_TOKENS = 192 * ROW_TOKENS
"""A corpus is a multiple of it: batches, steps and samples of 64 rows are then whole, so that nobody leaves out rows."""
MEDIAN_DOCUMENT_TOKENS, DOCUMENT_LENGTH_SIGMA = 400, 1.2
"""Of the lengths of documents, which are lognormal."""
SAMPLE_TOKENS, SHARD_TOKENS = 65_536, 1 << 25
"""As `tandem prepare` writes shards by default."""
FLAT_FILE, LENGTHS_FILE, SHARDS_FOLDER = "tokens.bin", "lengths.npy", "ours"


@dataclass(frozen=True)
class SyntheticCorpus:
    folder: Path
    num_tokens: int
    seed: int

    def open_tokens(self) -> np.ndarray:
        """All of it, flat, from disk as it is asked for."""
        return np.memmap(self.folder / FLAT_FILE, np.uint16, "r")

    def iterate_documents(self) -> Iterator[np.ndarray]:
        tokens, end = self.open_tokens(), 0
        for length in np.load(self.folder / LENGTHS_FILE).tolist():
            yield tokens[end : end + length]
            end += length


def write_corpus(corpus: SyntheticCorpus) -> None:
    """The corpus is in its folder, drawn from its seed; one that is there already stays.

    Raises: UserError where there is another.
    """
    shards_folder = corpus.folder / SHARDS_FOLDER
    if (shards_folder / manifest.MANIFEST_FILE).exists():
        found = manifest.load_manifest(shards_folder).settings
        if found != _settings(corpus):
            raise UserError(f"--folder: {corpus.folder} holds a corpus of {found}; name another folder, or remove it")
        return
    shards_folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(corpus.seed)
    lengths = _draw_lengths(corpus.num_tokens, rng)
    tokens = rng.integers(0, EOS_ID, corpus.num_tokens, np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOS_ID
    tokens.tofile(corpus.folder / FLAT_FILE)
    np.save(corpus.folder / LENGTHS_FILE, lengths)
    del tokens
    train = write_split(
        shards_folder,
        "train",
        corpus.iterate_documents(),
        sample_tokens=SAMPLE_TOKENS,
        shard_tokens=min(SHARD_TOKENS, corpus.num_tokens // 3),
    )
    atomic_write(shards_folder / manifest.MANIFEST_FILE, manifest.dump_manifest(_manifest(corpus, train)))


def _draw_lengths(num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each document, EOS counted."""
    ends = np.cumsum(
        np.maximum(
            2,
            rng.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), DOCUMENT_LENGTH_SIGMA, num_tokens // 100 + 10).astype(
                np.int64
            ),
        )
    )
    inside = ends[ends < num_tokens]
    return np.diff(inside, prepend=0, append=num_tokens)


def _manifest(corpus: SyntheticCorpus, train: CorpusSplit) -> CorpusManifest:
    return CorpusManifest(
        dtype="uint16", sample_tokens=SAMPLE_TOKENS, vocab=VOCAB_SIZE, eos_token="<|endoftext|>", eos_id=EOS_ID,
        tokenizer_sha256=sha256(b"none").hexdigest(), unigram_entropy_nats=float(np.log(EOS_ID)), counts={},
        settings=_settings(corpus), train=train, validation=CorpusSplit(0, 0, []),
    )  # fmt: skip


def _settings(corpus: SyntheticCorpus) -> dict[str, int]:
    return {name: value for name, value in asdict(corpus).items() if name != "folder"}
