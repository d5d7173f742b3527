"""The corpus that everyone reads: random ids in documents of lengths as web text has them, as shards of ours and flat."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from tandem.data_prep.shard_writer import write_split
from tandem.trainer.config import UserError
from tandem.trainer.data import manifest
from tandem.trainer.data.manifest import Manifest, Split
from tandem.trainer.disk import write_whole

VOCAB, EOS_ID = 50_257, 50_256
ROW_TOKENS = 2_049
"""A row of 2,048 tokens and their targets."""
UNIT_TOKENS = 192 * ROW_TOKENS
"""A corpus is a multiple of it: batches, steps and samples of 64 rows are then whole, so that nobody leaves out rows."""
MEDIAN_TOKENS, SIGMA = 400, 1.2
"""Of the lengths of documents, which are lognormal."""
SAMPLE_TOKENS, SHARD_TOKENS = 65_536, 1 << 25
"""As `tandem prepare` writes shards by default."""
FLAT, LENGTHS, OURS = "tokens.bin", "lengths.npy", "ours"


@dataclass(frozen=True)
class Corpus:
    folder: Path
    num_tokens: int
    seed: int

    def tokens(self) -> np.ndarray:
        """All of it, flat, from disk as it is asked for."""
        return np.memmap(self.folder / FLAT, np.uint16, "r")

    def documents(self) -> Iterator[np.ndarray]:
        tokens, end = self.tokens(), 0
        for length in np.load(self.folder / LENGTHS).tolist():
            yield tokens[end : end + length]
            end += length


def written(corpus: Corpus) -> None:
    """The corpus is in its folder, drawn from its seed; one that is there already stays.

    Raises: UserError where there is another.
    """
    ours = corpus.folder / OURS
    if (ours / manifest.FILE).exists():
        found = manifest.load(ours).settings
        if found != _settings(corpus):
            raise UserError(f"--folder: {corpus.folder} holds a corpus of {found}; name another folder, or remove it")
        return
    ours.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(corpus.seed)
    lengths = _lengths(corpus.num_tokens, rng)
    tokens = rng.integers(0, EOS_ID, corpus.num_tokens, np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOS_ID
    tokens.tofile(corpus.folder / FLAT)
    np.save(corpus.folder / LENGTHS, lengths)
    del tokens
    train = write_split(
        ours,
        "train",
        corpus.documents(),
        sample_tokens=SAMPLE_TOKENS,
        shard_tokens=min(SHARD_TOKENS, corpus.num_tokens // 3),
    )
    write_whole(ours / manifest.FILE, manifest.dump(_manifest(corpus, train)))


def _lengths(num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each document, EOS counted."""
    ends = np.cumsum(
        np.maximum(2, rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA, num_tokens // 100 + 10).astype(np.int64))
    )
    inside = ends[ends < num_tokens]
    return np.diff(inside, prepend=0, append=num_tokens)


def _manifest(corpus: Corpus, train: Split) -> Manifest:
    return Manifest(
        dtype="uint16", sample_tokens=SAMPLE_TOKENS, vocab=VOCAB, eos_token="<|endoftext|>", eos_id=EOS_ID,
        tokenizer_sha256=sha256(b"none").hexdigest(), unigram_entropy_nats=float(np.log(EOS_ID)), counts={},
        settings=_settings(corpus), train=train, validation=Split(0, 0, []),
    )  # fmt: skip


def _settings(corpus: Corpus) -> dict[str, int]:
    return {name: value for name, value in asdict(corpus).items() if name != "folder"}
